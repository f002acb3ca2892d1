"""In every format, each value of a record is in the conversation, or its field is named, or the record is refused."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftchat.conversation import Conversation
from peftchat.conversations import ProblemLog, list_formats, read_conversations
from peftchat.conversations.formats import names
from peftchat.conversations.messages_file import record_line
from peftchat.errors import UserError

EXAMPLES = int(os.environ.get("PEFTCHAT_TEST_EXAMPLES", "40"))

CALL = {"id": "call id", "type": "function", "function": {"name": "find", "arguments": {"what": "argument", "n": 1.5}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "description", "parameters": {"a": "schema"}}}
TURNS = [
    {"role": "system", "content": "rules"},
    {"role": "user", "content": "question", "name": "speaker"},
    {"role": "assistant", "content": "words", "reasoning_content": "thoughts", "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": "result", "tool_call_id": "call id", "name": "tool name"},
    {"role": "assistant", "content": [{"type": "text", "text": "part"}, {"type": "thinking", "thinking": "thought"}]},
]
SHARED = [
    {"from": "human", "value": "question"},
    {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "argument"}}'},
    {"from": "observation", "value": "result"},
    {"from": "gpt", "value": "answer", "train": False},
]
MESSAGE = {"message_id": "id", "user_id": "user", "text": "question", "role": "prompter", "lang": "en", "rank": None}
REPLY = {**MESSAGE, "text": "answer", "role": "assistant", "labels": {"spam": {"value": 0}}}
NODE = {"id": "m", "author": {"role": "user", "name": None}, "recipient": "all", "weight": 1.0, "metadata": {}}


def node(key: str, parent: str | None, text: str, role: str) -> dict[str, Any]:
    content = {"content_type": "text", "parts": [text]}
    return {"id": key, "parent": parent, "message": {**NODE, "author": {"role": role}, "content": content}}


RECORDS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": TURNS, "tools": [TOOL], "id": "identity", "category": "kind"},
        {
            "messages": [*TURNS[1:4], {"role": "assistant", "content": "end"}],
            "system": "rules",
            "loss_mask": [0, 0, 0, 1],
        },
        {"messages": [{"role": "user", "content": "question"}], "chosen": {"role": "assistant", "content": "good"}},
        {"messages": TURNS[:2], "response": "answer", "id": "identity"},
        {
            "custom_id": "identity",
            "body": {"model": "name", "messages": TURNS[:2], "tools": [TOOL]},
            "response": {"request_id": "r", "body": {"id": "c", "choices": [{"index": 0, "message": TURNS[2]}]}},
        },
        {
            "request": {"system": "rules", "messages": TURNS[1:2]},
            "response": {"role": "assistant", "content": [{"type": "text", "text": "part"}], "stop_reason": "end_turn"},
        },
        {
            "instructions": "rules",
            "input": [{"role": "user", "content": "question"}],
            "output": [
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "thoughts"}]},
                {"type": "function_call", "id": "f", "call_id": "c", "name": "find", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "result"},
                {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            ],
        },
    ],
    "sharegpt": [
        {"conversations": SHARED, "system": "rules", "tools": json.dumps([TOOL])},
        {"conversation": [{"human": "question", "assistant": "answer"}]},
        {"conversations": SHARED[:1], "chosen": SHARED[3], "rejected": {"from": "gpt", "value": "bad"}},
    ],
    "oasst": [
        {
            "message_tree_id": "tree",
            "tree_state": "ready_for_export",
            "prompt": {**MESSAGE, "review_result": True, "replies": [REPLY, {**REPLY, "text": "other answer"}]},
        },
        {"thread_id": "thread", "thread": [MESSAGE, REPLY]},
    ],
    "chatgpt_export": [
        {
            "title": "title",
            "create_time": 1.5,
            "mapping": {
                "root": {"id": "root", "message": None, "parent": None, "children": ["u"]},
                "u": node("u", "root", "question", "user"),
                "a": node("a", "u", "answer", "assistant"),
                "b": node("b", "u", "other answer", "assistant"),
            },
            "current_node": "a",
            "conversation_id": "identity",
        }
    ],
    "gemini": [
        {
            "contents": [
                {"role": "user", "parts": [{"text": "question"}]},
                {"role": "model", "parts": [{"text": "words"}, {"functionCall": {"name": "find", "args": {"a": "b"}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "find", "response": {"out": "result"}}}]},
                {"role": "model", "parts": [{"text": "answer"}]},
            ],
            "systemInstruction": {"role": "system", "parts": [{"text": "rules"}]},
        }
    ],
    "glaive": [
        {
            "system": "SYSTEM: rules",
            "chat": 'USER: question\n\n\nASSISTANT: words <functioncall> {"name": "find", "arguments": \'{"a": "b"}\'} '
            "<|endoftext|>\n\n\nFUNCTION RESPONSE: result\n\n\nASSISTANT: answer <|endoftext|>",
        }
    ],
    "xlam": [
        {"query": "question", "answers": [{"name": "find", "arguments": {"a": "b"}}], "tools": json.dumps([TOOL])}
    ],
    "preference": [
        {"prompt": "question", "input": "about", "chosen": "good", "rejected": "bad", "system": "rules"},
        {"chosen": TURNS[:3], "rejected": TURNS[:3]},
        {"prompt": [TURNS[1]], "chosen": [TURNS[4]], "rejected": [TURNS[4]]},
        {
            "instruction": "question",
            "completions": [
                {"response": "good", "overall_score": 8.5},
                {"response": "bad", "overall_score": 1, "model": "m"},
            ],
        },
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": "good", "rank": 1.0}, {"answer": "b", "rank": 2.0}],
        },
    ],
    "guanaco": [{"text": "rules### Human: question### Assistant:", "output": "answer", "lang": "en"}],
    "templated_text": [{"text": "<s>[INST] <<SYS>>rules<</SYS>> question [/INST] answer </s>", "lang": "en"}],
    "alpaca": [{"instruction": "do", "input": "about", "output": "answer", "system": "rules", "history": [["a", "b"]]}],
    "self_instruct": [
        {"instruction": "do", "system": "rules", "instances": [{"input": "about", "output": "answer"}, {"output": "b"}]}
    ],
    "prompt_completion": [
        {"prompt": "question", "completion": "answer", "context": "about", "reasoning": "thoughts"},
        {"prompt": TURNS[:2], "completion": [TURNS[4]], "tools": [TOOL]},
        {"question": [{"type": "text", "text": "question"}], "answer": [{"type": "text", "text": "answer"}]},
    ],
}

Place = tuple[str | int, ...]

FIXED = {"role", "from", "tree_state", "content_type", "type", "recipient", "current_node", "parent", "human", "chat"}
"""Fields whose value decides how the record is read; they get canaries beside them and by the hostile test."""


def objects(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of every object in a value."""
    if isinstance(value, dict):
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from objects(item, (*place, key))


def leaves(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of every value that is no object and no list."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*place, key))
    else:
        yield place


def at(record: Any, place: Place) -> Any:
    for key in place:
        record = record[key]
    return record


def with_value(record: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    at(changed, place[:-1])[place[-1]] = value
    return changed


def read(path: Path, record: dict[str, Any], form: str) -> tuple[list[Conversation], ProblemLog]:
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    log = ProblemLog()
    return list(read_conversations(path, format=form, problems=log)), log


def everything_in(conversation: Conversation) -> str:
    """All that a conversation holds, as text."""
    parts = [conversation.tools or "", json.dumps(dict(conversation.columns), ensure_ascii=False, default=str)]
    for message in conversation.messages:
        parts += [message.role, message.content, message.name or "", message.tool_call_id or ""]
        parts += [message.reasoning or "", *(f"{call.name}{call.arguments}{call.id}" for call in message.tool_calls)]
    return "\n".join(parts)


def is_accounted_for(canary: str, place: Place, found: list[Conversation], log: ProblemLog) -> bool:
    """Whether a value was read, or a field on the way to it is named, or the record was refused for a reason."""
    if log.total or log.skipped:
        return True
    if any(canary in everything_in(one) for one in found):
        return True
    told = {name.partition(" in ")[0].partition(":")[0] for name in log.unused}
    return any(str(key) in told for key in place)


FORMS = [(form, record) for form, records in RECORDS.items() for record in records]
KNOWN_NAMES = sorted(
    {
        *(*names.ROLE, *names.CONTENT, *names.REASONING, *names.SYSTEM, *names.TOOLS, *names.CONTEXT, *names.TURNS),
        *(*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS, *names.TURN_MASKS, *names.MEDIA, *names.ASKED, *names.ANSWERED),
        *("id", "type", "index", "name", "refusal", "annotations", "function_call", "tool_calls", "tool_call_id"),
        *("arguments", "parameters", "input", "args", "parts", "cache_control", "signature", "is_error", "masked"),
        *("label", "chosen", "rejected", "history", "metadata", "replies", "instances", "strict", "status", "source"),
    }
)
NEW_NAMES = st.sampled_from(KNOWN_NAMES) | st.text("abcxyz_", min_size=3, max_size=8).map("zz".__add__)


def test_every_format_has_a_record() -> None:
    assert RECORDS.keys() == {name for name, _ in list_formats()} - {"auto"}


@pytest.mark.parametrize(("form", "record"), FORMS)
def test_a_record_of_each_format_is_read(tmp_path: Path, form: str, record: dict[str, Any]) -> None:
    found, log = read(tmp_path / "one.jsonl", record, form)
    assert found
    assert not log.total


@pytest.mark.parametrize(("form", "record"), FORMS)
def test_each_value_is_read_or_its_field_is_named(tmp_path: Path, form: str, record: dict[str, Any]) -> None:
    for number, place in enumerate(leaves(record)):
        if any(key in FIXED for key in place if key != "parts") or not isinstance(at(record, place), str):
            continue
        text = at(record, place)
        canary = f"canary-{number:03}"
        value = f"{text}{canary}" if not text.lstrip().startswith(("{", "[", "SYSTEM")) else None
        if value is None or text == "rules### Human: question### Assistant:":
            continue
        found, log = read(tmp_path / "one.jsonl", with_value(record, place, value), form)
        assert is_accounted_for(canary, place, found, log), (place, found, log.unused)


@settings(max_examples=EXAMPLES * 10)
@given(data=st.data(), form=st.sampled_from(FORMS))
def test_a_field_added_anywhere_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, form: tuple[str, dict[str, Any]]
) -> None:
    record = form[1]
    where = data.draw(st.sampled_from(list(objects(record))), "object")
    name = data.draw(NEW_NAMES.filter(lambda name: name not in at(record, where)), "name")
    canary = "canary-" + data.draw(st.integers(10**6, 10**7).map(str), "canary")
    value = data.draw(
        st.sampled_from(
            [
                canary,
                [canary],
                {"inner": canary},
                [{"type": "text", "text": canary}],
                [{"role": "user", "content": canary}],
            ]
        )
    )
    place = (*where, name)
    found, log = read(tmp_path_factory.getbasetemp() / "added.jsonl", with_value(record, place, value), form[0])
    assert is_accounted_for(canary, place, found, log), (place, found, log.unused)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NEW_NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=EXAMPLES * 15)
@given(data=st.data(), form=st.sampled_from(FORMS))
def test_any_value_in_any_field_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, form: tuple[str, dict[str, Any]]
) -> None:
    """What is read is also the same after it was written and read again."""
    name, record = form
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(list(objects(record))), "object")
        key = data.draw(st.sampled_from([*at(record, where), data.draw(NEW_NAMES, "new")]), "field")
        record = with_value(record, (*where, key), data.draw(ANY_JSON, "value"))
    try:
        found, log = read(path, record, name)
    except UserError:
        return
    assert found or log.total or log.skipped
    for one in found:
        path.write_bytes(record_line(one))
        (again,) = read_conversations(path, format="messages", problems=ProblemLog())
        assert (again.messages, again.tools) == (one.messages, one.tools)
        # The written record has turns of its own; such a column is told.
        kept = {key: value for key, value in one.columns.items() if key != "messages"}
        if kept.get("source", "") == "":  # the place of the record, where a table has an empty cell
            kept["source"] = one.source
        assert kept == dict(again.columns)
