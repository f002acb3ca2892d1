"""A source's own names of fields and roles, and what users are shown of each format."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversation import Conversation, Message, ToolCall
from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.formats import FORMATS, describe_formats
from peftchat.errors import UserError
from tests.support.in_process import peftchat_in_process as run


def read(path: Path, rows: list[Any], log: ProblemLog | None = None, format: str = "auto", **options: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_conversations(path, format=format, problems=log, options=ReadOptions(**options)))


def said(*turns: str) -> Conversation:
    """Turns as `u: text`, with s, u, a or t in front."""
    roles: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation(tuple(Message(roles[turn[0]], turn[3:]) for turn in turns))


def called(text: str, tool: str, name: str, arguments: str, *rest: str, **extra: Any) -> Conversation:
    """A question, a call and what follows."""
    call = ToolCall(name, arguments, extra.get("id"), extra.get("as_text", False))
    start = [Message("system", text[3:])] if text.startswith("s: ") else []
    question = Message("user", extra.get("question", text[3:]))
    turns = [*start, question, Message("assistant", "", (call,))]
    if tool:
        turns.append(Message("tool", tool, (), extra.get("id"), extra.get("tool_name")))
    return Conversation((*turns, *said(*rest).messages), "", extra.get("tools"))


FIND = (
    '[{"type": "function", "function": {"name": "find", "parameters": {"properties": {"what": {"type": "string"}}}}}]'
)
HELLO = said("u: Hi", "a: Hello!")
EXPECTED: dict[str, list[Conversation]] = {
    "messages": [
        Conversation(
            (
                *said("s: Be kind.", "u: Hi").messages,
                Message("assistant", "Go away.", train=False),
                *said("u: Please?", "a: Hello!").messages,
            )
        ),
        called(
            "u: Where is my hat?", "under the bed", "find", '{"what": "hat"}', "a: Under the bed.", id="c1", tools=FIND
        ),
    ],
    "sharegpt": [
        HELLO,
        called(
            "s: Be kind.", "under the bed", "find", '{"what": "hat"}', "a: Under the bed.", question="Where is my hat?"
        ),
    ],
    "oasst": [HELLO, said("u: Hi", "a: Hey."), said("u: A hat?", "a: A red one.")],
    "chatgpt_export": [HELLO, said("s: Be kind.", "u: A hat?", "a: A red one.")],
    "gemini": [
        HELLO,
        called(
            "s: Be kind.",
            '{"degrees": 21}',
            "weather",
            '{"city": "Oslo"}',
            "a: Yes.",
            question="Is it warm?",
            tool_name="weather",
        ),
    ],
    "glaive": [
        said("s: Be kind.", "u: Hi", "a: Hello!"),
        called("u: Is it warm?", "21", "weather", '{"city": "Oslo"}', "a: Yes.", as_text=True),
    ],
    "xlam": [
        called(
            "u: Is it warm in Oslo?",
            "",
            "weather",
            '{"city": "Oslo"}',
            tools='[{"name": "weather", "parameters": {"city": {"type": "str"}}}]',
        ),
        called(
            "u: Wake me at 7.",
            "",
            "alarm",
            '{"hour": 7}',
            tools='[{"name": "alarm", "parameters": {"hour": {"type": "int"}}}]',
        ),
    ],
    "preference": [said("u: A joke?", "a: A horse walks into a bar."), HELLO],
    "guanaco": [HELLO, said("s: Be kind.", "u: Hi", "a: Hello!")],
    "alpaca": [
        said("u: Translate to English.\n\nGuten Tag", "a: Good day"),
        said("u: Translate: Hallo", "a: Hello", "u: And to French?", "a: Bonjour"),
    ],
    "self_instruct": [
        said("u: Translate to English.\n\nGuten Tag", "a: Good day"),
        said("u: Name a color.", "a: Red"),
        said("u: Name a color.", "a: Blue"),
    ],
    "prompt_completion": [
        said("u: What is 2 + 2?", "a: It is 4."),
        said("s: Be brief.", "u: Who wrote it?\n\nAda wrote the notes.", "a: Ada."),
    ],
    "templated_text": [said("u: Hi", "a: Hello!"), said("s: Be kind.", "u: Hi", "a: Hello!")],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_examples_of_a_format_are_read_as_what_they_say(tmp_path: Path, name: str) -> None:
    examples = describe_formats(name)[name]["examples"]
    log = ProblemLog()
    found = read(tmp_path / "rows.jsonl", examples, log)
    assert [(one.messages, one.tools) for one in found] == [(one.messages, one.tools) for one in EXPECTED[name]]
    assert log.formats == {str(tmp_path / "rows.jsonl"): name}
    assert not log.problems
    assert set(log.unused) <= {"rejected"}
    assert len(examples) == 2


def test_the_command_shows_records_that_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "data", "formats", "alpaca")
    assert shown.returncode == 0
    lines = [line.strip() for line in shown.stdout.splitlines() if line.startswith("    {")]
    assert [json.loads(line) for line in lines] == describe_formats("alpaca")["alpaca"]["examples"]
    listed = run(capsys, "data", "formats", "--json")
    assert json.loads(listed.stdout)["formats"].keys() == FORMATS.keys()
    wrong = run(capsys, "data", "formats", "alpacca")
    assert wrong.returncode == 2
    assert "'alpaca'" in wrong.stderr


def test_turns_as_json_text_and_the_language_are_renamed_too(tmp_path: Path) -> None:
    turns = [{"by": "user", "says": "Hi", "n": 1.50}, {"by": "assistant", "says": "Hello", "role": "greeter"}]
    rows = [{"talk": value, "sprache": lang} for value, lang in ((json.dumps(turns), "en"), (turns, "de"))]
    log = ProblemLog(strict=True)
    columns = {"messages": "talk", "role": "by", "content": "says", "lang": "sprache"}
    found = read(tmp_path / "rows.jsonl", rows, log, columns=columns, languages=("en",))
    assert [one.messages for one in found] == [said("u: Hi", "a: Hello").messages]
    assert log.skipped == {"other_language": 1}
    assert log.unused["role in a turn"].records == 2


def test_a_field_that_gives_way_to_a_mapped_one_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "p1", "question": "Hi", "answer": "Hello"}, {"prompt": "Hm", "answer": "Yes"}]
    log = ProblemLog(strict=True)
    found = read(tmp_path / "rows.jsonl", rows, log, columns={"prompt": "question"})
    assert [one.messages for one in found] == [said("u: Hi", "a: Hello").messages, said("u: Hm", "a: Yes").messages]
    assert log.unused["prompt"].records == 1


@pytest.mark.parametrize("exact", [False, True])
def test_a_role_of_the_source_stands_before_the_usual_ones(tmp_path: Path, exact: bool) -> None:
    row = {
        "messages": [{"role": "bot", "content": "Hi"}, {"role": "Tool_Call", "content": "Hello", "id": 1.5}],
        "number": 1.50 if exact else 1,
    }
    roles = {"bot": "user", "tool_call": "assistant"}
    (one,) = read(tmp_path / "rows.jsonl", [row], roles=roles)
    assert one.messages == said("u: Hi", "a: Hello").messages


PAIR = {"ask": "Hi", "answer": "Hello"}
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (PAIR, {"columns": {"prompt": "asq"}}, "no record has the field 'asq', which `columns` gives for `prompt`; "),
        (TALK, {"columns": {"role": "by"}}, "no record has the field 'by', which `columns` gives for `role`; found: "),
        (PAIR, {"columns": {"prompt": "ask", "system": "ask"}}, "takes `prompt` and `system` from one field, 'ask'"),
        ({**TALK, "ask": "x"}, {"columns": {"prompt": "ask"}}, "read as `messages`, which has no field `prompt`"),
        ({"text": "### Human: a### Assistant: b"}, {"roles": {"x": "user"}}, "`guanaco` has fixed roles"),
    ],
)
def test_a_mapping_that_does_not_fit_is_one_error(tmp_path: Path, row: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path / "rows.jsonl", [row], **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--columns", "promptt=ask"), "unknown field `promptt`; known: prompt, completion,"),
        (("--columns", "prompt"), "'prompt' is not NAME=NAME"),
        (("--columns", "prompt=ask,prompt=answer"), "`prompt` is there twice"),
        (("--columns", "prompt=ask", "--columns", "prompt=answer"), "`prompt` is there twice"),
        (("--roles", "agent=assistantt"), "unknown role `assistantt`; known: system, user, assistant, tool"),
        (("--subset", "main"), "subset"),
    ],
)
def test_options_that_name_nothing_are_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    for command in (("prepare", path, "-o", tmp_path / "out"), ("stats", path)):
        done = run(capsys, "data", *command, *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "out").exists()


def test_options_mean_what_the_recipe_keys_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [("customer", "Hi"), ("customer", "Hello?"), ("agent", "Yes?")]
    path.write_text(json.dumps({"talk": [{"by": by, "says": says} for by, says in turns]}) + "\n")
    options = ["--columns", "messages=talk,role=by", "--roles", "customer=user", "--consecutive", "merge"]
    options += ["--columns", "content=says", "--roles", "agent=assistant"]
    done = run(capsys, "data", "prepare", str(path), "-o", str(tmp_path / "out"), "--eval-fraction", "0", *options)
    assert done.returncode == 0, done.stderr
    (one,) = read_conversations(tmp_path / "out" / "train.jsonl")
    assert one.messages == said("u: Hi\nHello?", "a: Yes?").messages
    counted = run(capsys, "data", "stats", str(path), "--json", *options)
    assert json.loads(counted.stdout)["parts"][0]["conversations"] == 1


def test_the_examples_of_the_docs_are_records_of_their_formats(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\{.*\})` \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == FORMATS.keys()
    for name, example in rows:
        log = ProblemLog(strict=True)
        (one,) = read(tmp_path / f"{name}.jsonl", [json.loads(example)], log)
        assert one.messages[-1].role == "assistant"
        assert list(log.formats.values()) == [name]


@pytest.mark.parametrize("value", ["text", [{"role": "user", "content": [{"type": "text", "value": "a"}]}]])
def test_the_hint_for_pairs_of_other_names_gives_both_columns(tmp_path: Path, value: object) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen_score": 1, "chosen_messages": value, "rejected_messages": value}))
    with pytest.raises(UserError, match="chosen: chosen_messages, rejected: rejected_messages"):
        list(read_conversations(path))


@pytest.mark.parametrize("number", ["1e400", "-1E999"])
def test_arguments_with_a_number_beyond_a_double_stay_text(number: str) -> None:
    text = f'{{"x": {number}}}'
    assert ToolCall("f", text).parsed() == text
    assert ToolCall("f", '{"x": 1e300}').parsed() == {"x": 1e300}


@pytest.mark.parametrize("number", ["1e400", "-1E999"])
def test_a_number_beyond_a_double_in_a_definition_reaches_templates_as_json(tmp_path: Path, number: str) -> None:
    path = tmp_path / "calls.jsonl"
    schema = f'{{"name": "find", "parameters": {{"maximum": {number}, "minimum": 1.5}}}}'
    turns = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    path.write_text(f'{{"messages": {turns}, "tools": [{schema}]}}\n')
    (one,) = read_conversations(path)
    assert one.tools is not None
    assert number in one.tools
    (tool,) = one.tool_schemas() or ()
    assert tool["function"]["parameters"] == {"maximum": number, "minimum": 1.5}
    json.dumps(tool, allow_nan=False)
