"""Calls in answers: read from the spellings of several families of models, and only where they name a tool."""

import json
from pathlib import Path

import pytest

from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.serving.history import ChatHistory
from peftchat.serving.tool_calls import read_tools, read_tools_file, split_calls

TOOLS = json.dumps([{"type": "function", "function": {"name": "find"}}, {"name": "add", "parameters": {}}])
FIND = '{"name": "find", "arguments": {"what": "a \\"hat\\"", "size": 5}}'
ADD = '{"name": "add", "parameters": {"a": 1.5}}'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (f"<tool_call>\n{FIND}\n</tool_call>", "", ["find"]),
        (f"Let me look.\n<tool_call>{FIND}</tool_call>\n<tool_call>{ADD}</tool_call>", "Let me look.", ["find", "add"]),
        (f"<tool_call>\n{FIND}", "", ["find"]),
        (f"[TOOL_CALLS] [{FIND}, {ADD}]", "", ["find", "add"]),
        (f"<|python_tag|>{ADD}", "", ["add"]),
        (f"{ADD}; {ADD}", "", ["add", "add"]),
        (FIND, "", ["find"]),
    ],
)
def test_calls_are_read(text: str, content: str, names: list[str]) -> None:
    found, calls = split_calls(text, TOOLS)
    assert found == content
    assert [call.name for call in calls] == names
    expected = {"find": {"what": 'a "hat"', "size": 5}, "add": {"a": 1.5}}
    assert [call.parsed() for call in calls] == [expected[name] for name in names]
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize(
    "text",
    [
        "Hello.",
        "",
        '{"name": "Ada", "arguments": {}}',  # no tool's name
        '{"name": "find", "arguments": [1]}',
        '{"find": 1}',
        "[1, 2]",
        "<tool_call>find(hat)</tool_call>",
        f"<tool_call>{FIND}</tool_call><tool_call>oops</tool_call>",
        f"It is {FIND}.",
        "[" * 100_000,
    ],
)
def test_everything_else_is_text(text: str) -> None:
    assert split_calls(text, TOOLS) == (text, ())


@pytest.mark.parametrize(
    ("text", "told"), [("{}", "list"), ("[1]", "no name"), ("[]", "no tools"), ("[{", "list"), ("\xff", "list")]
)
def test_a_file_without_tools_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told) as error:
        read_tools_file(str(path), "--tools")
    assert str(error.value).startswith(f"--tools {path}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_bytes(b"\xff\xfe[]")
    refused = [(tmp_path, "directory"), (tmp_path / "none", "No such file"), (tmp_path / "tools.json", "UTF-8")]
    for path, told in refused:
        with pytest.raises(UserError, match=told):
            read_tools_file(str(path), "--tools")


def test_results_answer_calls_in_their_order() -> None:
    history = ChatHistory(tools=read_tools(TOOLS))
    assert history.open_calls() == []
    history.turns.append(Message("user", "both"))
    history.turns.append(history.answer(f"<think>Hm.</think><tool_call>{FIND}</tool_call><tool_call>{ADD}</tool_call>",
                                        opened=False))  # fmt: skip
    assert history.turns[-1].reasoning == "Hm."
    first, second = history.open_calls()
    history.turns.append(Message("tool", "one", (), first.id, first.name))
    assert history.open_calls() == [second]
    history.turns.append(Message("tool", "two", (), second.id, second.name))
    assert history.open_calls() == []
    history.turns.append(history.answer("Both are done.", opened=False))
    # The next call has an id of its own.
    history.turns.append(Message("user", "again"))
    history.turns.append(history.answer(FIND, opened=False))
    assert history.open_calls()[0].id not in (first.id, second.id)
    assert history.undo() == "again" and history.undo() == "both" and history.undo() is None
    assert history.turns == []
