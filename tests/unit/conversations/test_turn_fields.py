"""What a record says besides roles and contents: used, kept, told or refused, and never passed over."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftchat.chat_template.message_text import message_text, write_call
from peftchat.conversation import Conversation, Message, ToolCall
from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.messages_file import record_line
from peftchat.errors import UserError
from peftchat.json_text import normalize_json

U, A = {"role": "user", "content": "Where is the key?"}, {"role": "assistant", "content": "In the lock."}


def read(path: Path, *rows: Any, log: ProblemLog | None = None, **options: Any) -> list[Conversation]:
    path = path / "rows.jsonl" if path.is_dir() else path
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_conversations(path, problems=log or ProblemLog(strict=True), options=ReadOptions(**options)))


@pytest.mark.parametrize(
    ("flag", "train"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"loss": False}, False),
        ({"train": False}, False),
        ({"loss_weight": 0.0}, False),
        ({"trainable": 0}, False),
        ({"train": None}, None),
    ],
)
@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_a_flag_of_an_answer_is_read(tmp_path: Path, flag: Any, train: bool | None, names: tuple[str, ...]) -> None:
    turns, role, content = names
    row = {turns: [{role: "user", content: "a"}, {role: "assistant", content: "b", **flag}]}
    (one,) = read(tmp_path, row)
    assert [message.train for message in one.messages] == [None, train]


@pytest.mark.parametrize(
    ("turn", "record"),
    [
        ({"weight": 0.3}, {}),
        ({"train": "no"}, {}),
        ({"train": True, "weight": 0}, {}),
        ({"train_detail": [{"begin": 0}]}, {}),
        ({"masked": True}, {}),
        ({}, {"loss_mask": [0, 1, 1]}),
        ({}, {"loss_mask": [0, 2]}),
        ({}, {"mask": [0, 1]}),
        ({}, {"train": [0, 1, 1]}),
        ({}, {"last_turn_only": True}),
        ({}, {"train_indices": [1]}),
    ],
)
def test_a_flag_that_is_not_understood_is_refused(tmp_path: Path, turn: Any, record: Any) -> None:
    log = ProblemLog()
    assert not read(tmp_path, {"messages": [U, {**A, **turn}], **record}, log=log)
    assert dict(log.problems) == {"unknown_flag": 1}


def test_flags_of_a_whole_record(tmp_path: Path) -> None:
    log = ProblemLog(strict=True)
    turns = [U, A, U, A]
    masks = [{"loss_mask": [0, 0, 0, 1]}, {"loss_mask": [False, True]}, {"loss": [0, 1]}, {"train": [0.0, 0, 0, 1]}]
    rows = [{"messages": turns, **mask} for mask in masks]
    for one in read(tmp_path, *rows, {"messages": turns, "label": False}, {"messages": turns, "train": False}, log=log):
        assert [message.train for message in one.messages if message.role == "assistant"] == [False, True]
    assert dict(log.skipped) == {"label_is_false": 1, "flagged_not_to_train": 1}


def test_losses_that_a_record_brings_are_no_flags(tmp_path: Path) -> None:
    log = ProblemLog()
    (one,) = read(tmp_path, {"messages": [U, A], "loss": [2.5, 0.25]}, log=log)
    assert [message.train for message in one.messages] == [None, None]
    assert set(log.unused) == {"loss"}


def test_numbers_of_tools_and_calls_stay_as_they_are_written(tmp_path: Path) -> None:
    arguments = '{"z": 1.50, "a": [1E5, 123456789012345678901234567890], "é": "\\u00e9"}'
    call = f'{{"id": "c1", "function": {{"name": "f", "arguments": {arguments}}}}}'
    answer = f'{{"role": "assistant", "content": null, "tool_calls": [{call}]}}'
    line = f'{{"tools": [{{"name": "f", "max": 2.0}}], "messages": [{{"role": "user", "content": "q"}}, {answer}]}}\n'
    (one,) = read(tmp_path, line)
    assert one.tools == '[{"name": "f", "max": 2.0}]'
    (call,) = one.messages[1].tool_calls
    expected = '{"z": 1.50, "a": [1E5, 123456789012345678901234567890], "é": "é"}'
    assert call == ToolCall("f", expected, "c1")
    assert message_text(one.messages[1]) == f'<tool_call>\n{{"name": "f", "arguments": {expected}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "a", "input": "b", "answer": "c"}, ["a\n\nb", "c"]),
        ({"instruction": "a", "context": "b", "output": "c"}, ["a\n\nb", "c"]),
        ({"query": "a", "history": [["x", "y"]], "response": "c"}, ["x", "y", "a", "c"]),
        ({"input": "a", "output": "c"}, ["a", "c"]),
        ({"Question": "a", "Answer": "c"}, ["a", "c"]),
        ({"problem": "a", "solution": "c"}, ["a", "c"]),
        ({"system_prompt": "s", "question": "a", "response": "c"}, ["s", "a", "c"]),
        ({"system": "s", "messages": [U, A]}, ["s", U["content"], A["content"]]),
        ({"messages": json.dumps([U, A])}, [U["content"], A["content"]]),
        ({"dialog": [{"speaker": "Human", "text": "a"}, {"speaker": "AI", "text": "c"}]}, ["a", "c"]),
        ({"conversation": [{"input": "a", "output": "c"}]}, ["a", "c"]),
        ({"messages": [U], "chosen": A, "rejected": U}, [U["content"], A["content"]]),
        ({"prompt": "a", "chosen": "c", "rejected": "d"}, ["a", "c"]),
        ({"chosen": [U, A], "rejected": [U, A]}, [U["content"], A["content"]]),
        ({"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "c"}]}]}, "ac"),
    ],
)
def test_spellings_of_one_conversation(tmp_path: Path, row: Any, expected: Any) -> None:
    (one,) = read(tmp_path, row)
    assert [message.content for message in one.messages] == list(expected)
    assert one.messages[-1].role == "assistant"


def test_calls_in_the_form_of_other_tools(tmp_path: Path) -> None:
    call = '{"name": "f", "arguments": {"a": 1}}'
    shared = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}]
    xlam = {"query": "q", "answers": f"[{call}]", "tools": '[{"name": "f"}]'}
    glaive = {"system": "SYSTEM: s", "chat": f"USER: q\n\n\nASSISTANT: <functioncall> {call} <|endoftext|>"}
    anthropic = {
        "messages": [U, {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"a": 1}}]}]
    }
    for number, row in enumerate([{"conversations": shared}, xlam, glaive, anthropic]):
        (one,) = read(tmp_path / f"{number}.jsonl", row)
        text = f"<tool_call>\n{call}\n</tool_call>"
        assert [write_call(found) for found in one.messages[-1].tool_calls] == [text]


@pytest.mark.parametrize(("consecutive", "expected"), [("merge", ["a\nb", "c\nd"]), ("keep", ["a", "b", "c", "d"])])
def test_two_turns_of_one_role(tmp_path: Path, consecutive: str, expected: list[str]) -> None:
    pairs = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    log = ProblemLog(strict=True)
    row = {"messages": [{"role": role, "content": content} for role, content in pairs]}
    (one,) = read(tmp_path, row, log=log, consecutive=consecutive)
    assert [message.content for message in one.messages] == expected
    assert log.notes["turns_merged"] == (2 if consecutive == "merge" else 0)


def test_columns_are_renamed(tmp_path: Path) -> None:
    row = {"who": "x", "dialogue_text": [{"by": "Client", "says": "a"}, {"by": "agent", "says": "c"}]}
    columns = {"messages": "dialogue_text", "role": "by", "content": "says"}
    (one,) = read(tmp_path, row, columns=columns, roles={"client": "user", "agent": "assistant"})
    assert [(message.role, message.content) for message in one.messages] == [("user", "a"), ("assistant", "c")]


_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
_SAID = st.one_of(_TEXT, st.sampled_from(["<|im_end|>", "</tool_call>", "\n\n  x", "```\n{}\n```"])).map(
    lambda text: text if text.strip() else f"{text}."
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_ARGUMENTS = st.dictionaries(_TEXT, _JSON, max_size=3).map(json.dumps)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    call = st.builds(
        lambda name, text, key, as_text: ToolCall(name, text if as_text else normalize_json(text), key, as_text),
        *(_SAID, _ARGUMENTS, st.none() | _SAID, st.booleans()),
    )
    flag = st.sampled_from([None, True, False])
    messages = [Message("system", draw(_TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(_SAID), train=draw(flag)))
        calls = tuple(draw(st.lists(call, max_size=2)))
        messages.append(Message("assistant", draw(_SAID), calls, None, None, draw(st.none() | _SAID), draw(flag)))
        if calls:
            messages.append(Message("tool", draw(_TEXT), (), draw(st.none() | _SAID), draw(st.none() | _SAID)))
            messages.append(Message("assistant", draw(_SAID)))
    tools = draw(
        st.none() | st.lists(st.dictionaries(_TEXT, _JSON, max_size=3), min_size=1, max_size=2).map(json.dumps)
    )
    columns = draw(st.dictionaries(st.sampled_from(["id", "lang", "source"]), st.integers() | _SAID, max_size=3))
    return Conversation(tuple(messages), "a:1", None if tools is None else normalize_json(tools), columns)


@settings(max_examples=300, deadline=None)
@given(conversation=conversations())
def test_written_and_read_again_it_is_the_same_conversation(
    tmp_path_factory: pytest.TempPathFactory, conversation: Conversation
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    path.write_bytes(record_line(conversation))
    (again,) = read_conversations(path)
    assert again.messages == conversation.messages
    assert again.tools == conversation.tools
    assert dict(again.columns) == {"source": "a:1", **conversation.columns}


_NAMES = st.text("abcdefgxyz", min_size=3, max_size=8).map("zz_".__add__)


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(
        [
            {"messages": [U, A]},
            {"conversations": [U, A]},
            {"prompt": "a", "completion": "b"},
            {"text": "### Human: a### Assistant: b"},
        ]
    ),
    record=st.dictionaries(_NAMES, _JSON.filter(lambda value: value not in (None, "", [])), max_size=3),
    turn=st.dictionaries(_NAMES, _SAID, max_size=2),
)
def test_every_field_is_in_the_conversation_or_told(
    tmp_path_factory: pytest.TempPathFactory, form: dict[str, Any], record: dict[str, Any], turn: dict[str, Any]
) -> None:
    row = {**form, **record}
    turns = next((name for name in ("messages", "conversations") if name in form), None)
    if turns:
        row[turns] = [U, {**A, **turn}]
    path = tmp_path_factory.getbasetemp() / "canary.jsonl"
    path.write_bytes(
        orjson.dumps(row, option=orjson.OPT_PASSTHROUGH_SUBCLASS) if _fits(row) else json.dumps(row).encode()
    )
    log = ProblemLog(strict=True)
    (one,) = read_conversations(path, problems=log)
    assert log.unused.keys() == record.keys() | ({f"{name} in a turn" for name in turn} if turns else set())
    assert one.columns == record


def _fits(value: object) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_list_of_turns_is_a_conversation(tmp_path: Path, name: str) -> None:
    call = '{"function": {"name": "f", "arguments": {"x": 1.50}}}'
    lines = [f'[{{"role": "user", "content": "{n}"}}, {{"role": "assistant", "tool_calls": [{call}]}}]' for n in "abc"]
    path = tmp_path / name
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    found = list(read_conversations(path))
    assert [one.messages[0].content for one in found] == ["a", "b", "c"]
    assert {one.messages[1].tool_calls[0].arguments for one in found} == {'{"x": 1.50}'}
    path.write_text(lines[0])
    with pytest.raises(UserError, match="the records are turns, not conversations"):
        list(read_conversations(path))


def test_parts_hold_nothing_that_is_passed_over(tmp_path: Path) -> None:
    parts = [{"text": "Two and two.", "thought": True}, {"text": "4", "citations": ["x"]}]
    log = ProblemLog(strict=True)
    row = {"contents": [{"role": "user", "parts": [{"text": "2+2?"}]}, {"role": "model", "parts": parts}]}
    (one,) = read(tmp_path, row, log=log)
    assert (one.messages[1].content, one.messages[1].reasoning) == ("4", "Two and two.")
    assert log.unused.keys() == {"citations in a content part"}
    row = {"messages": [U, {**A, "refusal": "I cannot."}]}
    (one,) = read(tmp_path, row, log=log)
    assert "refusal in a turn" in log.unused


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "weather", "description": "d", "input_schema": SCHEMA},
        {"name": "weather", "description": "d", "inputSchema": SCHEMA},
        {"toolSpec": {"name": "weather", "description": "d", "inputSchema": {"json": SCHEMA}}},
        {"functionDeclarations": [{"name": "weather", "description": "d", "parameters": SCHEMA}]},
        {"type": "function", "name": "weather", "description": "d", "parameters": SCHEMA},
    ],
)
def test_tools_are_written_as_templates_know_them(tool: Any, tmp_path: Path) -> None:
    log = ProblemLog(strict=True)
    (one,) = read(tmp_path, {"messages": [U, A], "tools": [tool]}, log=log)
    function = {"name": "weather", "description": "d", "parameters": SCHEMA}
    assert json.loads(one.tools or "") == [{"type": "function", "function": function}]
    assert dict(log.notes) == {"tools_respelled": 1}


def test_an_analysis_is_the_reasoning_of_the_answer(tmp_path: Path) -> None:
    analysis, final = {**A, "content": "hm", "channel": "analysis"}, {**A, "channel": "final"}
    call = {
        "role": "assistant",
        "channel": "commentary",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    result = {"role": "tool", "content": "4"}
    log = ProblemLog(strict=True)
    first, second = read(
        tmp_path, {"messages": [U, analysis, final]}, {"messages": [U, analysis, call, result, final]}, log=log
    )
    assert [(message.content, message.reasoning) for message in first.messages[1:]] == [(A["content"], "hm")]
    assert [(message.reasoning, len(message.tool_calls)) for message in second.messages[1:]] == [
        ("hm", 1),
        (None, 0),
        (None, 0),
    ]
    assert list(log.unused) == ["channel in a turn"]


def test_a_record_of_another_split_is_told(tmp_path: Path) -> None:
    log = ProblemLog(strict=True)
    assert (
        len(read(tmp_path, {"messages": [U, A], "split": "test"}, {"messages": [U, A], "split": "train"}, log=log)) == 2
    )
    assert {name: one.records for name, one in log.unused.items()} == {"split: test": 1}


@pytest.mark.parametrize(("called", "noted"), [("weather", {}), ("clock", {"call_of_no_tool": 1})])
def test_a_call_of_a_function_that_no_tool_defines_is_told(called: str, noted: dict[str, int], tmp_path: Path) -> None:
    log = ProblemLog(strict=True)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": called, "arguments": "{}"}}]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    assert read(tmp_path, {"messages": [U, call, {"role": "tool", "content": "4"}, A], "tools": tools}, log=log)
    assert dict(log.notes) == noted


@pytest.mark.parametrize("below", [None, "data", "kwargs"])
def test_the_type_of_a_langchain_message_is_its_role(tmp_path: Path, below: str | None) -> None:
    turns: list[dict[str, Any]] = [
        {"type": "human", "content": "Where is it?"},
        {"type": "ai", "content": "", "tool_calls": [{"name": "f", "args": {"a": 1}, "id": "c", "type": "tool_call"}]},
        {"type": "tool", "content": "here", "tool_call_id": "c"},
        {"type": "ai", "content": "Here."},
    ]
    rows = turns if below is None else [{"type": turn["type"], below: turn} for turn in turns]
    log = ProblemLog(strict=True)
    (found,) = read(tmp_path, {"messages": rows}, log=log)
    assert [(message.role, message.content) for message in found.messages] == [
        ("user", "Where is it?"), ("assistant", ""), ("tool", "here"), ("assistant", "Here."),
    ]  # fmt: skip
    assert json.loads(found.messages[1].tool_calls[0].arguments) == {"a": 1}
    assert not log.unused


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
def test_a_call_keeps_its_arguments_under_every_name(tmp_path: Path, name: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", name: {"a": 1}}]}
    (found,) = read(tmp_path, {"messages": [U, call, {"role": "tool", "content": "x"}, A]})
    assert json.loads(found.messages[1].tool_calls[0].arguments) == {"a": 1}
