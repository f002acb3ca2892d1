"""Turns: from the objects of a list to messages, whatever names a file uses."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

from peftchat.conversation import Message, Role, ToolCall
from peftchat.conversations.formats import names
from peftchat.conversations.formats.calls import call_from_text, read_calls
from peftchat.conversations.formats.fields import Fields, Notes, parse_text, type_name
from peftchat.conversations.problems import RecordError
from peftchat.json_text import write_json

_KNOWN = frozenset(
    {
        *names.ROLE,
        *names.CONTENT,
        *names.REASONING,
        *names.TRAIN_FLAGS,
        *names.TRAIN_WEIGHTS,
        *("tool_calls", "function_call", "tool_call_id", "name"),
    }
)
# Fields of a turn whose names look like a flag's and are none.
_NO_FLAGS = frozenset({"annotations"})


def parse_turns(turns: Sequence[Fields], notes: Notes) -> list[Message]:
    """Messages from turns: objects with a role and a content, or with a question and its answer.

    Raises:
        RecordError: an unknown role, content that is not text, or a flag that is not understood.
    """
    messages: list[Message] = []
    speakers = notes.speakers
    for number, turn in enumerate(turns, start=1):
        if len(turn) == 2:
            speaker, content = turn.get("role"), turn.get("content")
            if speaker is None:
                speaker, content = turn.get("from"), turn.get("value")
            if type(content) is str and type(speaker) is str and (role := speakers.get(speaker)):
                messages.append(Message(role, content))
                continue
        if None in turn.values():
            turn = {name: value for name, value in turn.items() if value is not None or name in names.CONTENT}
        for message in _messages(turn, number, notes):
            _append(messages, message, turn)
    return messages


def _append(messages: list[Message], message: Message, turn: Fields) -> None:
    """Add a message; a turn that is nothing but calls belongs to the assistant's turn before it."""
    before = messages[-1] if messages else None
    calls_only = message.tool_calls and not message.content and _role_name(turn) in names.CALL_ROLES
    if before is None or not calls_only or before.role != "assistant" or before.train is not message.train:
        messages.append(message)
    else:
        messages[-1] = before._replace(tool_calls=before.tool_calls + message.tool_calls)


def _role_name(turn: Fields) -> str:
    found = next((turn[name] for name in names.ROLE if name in turn), "")
    return names.normalize_role(found) if isinstance(found, str) else ""


def _messages(turn: Fields, number: int, notes: Notes) -> list[Message]:
    if not any(name in turn for name in names.ROLE):
        exchange = _exchange(turn, notes)
        if exchange:
            return exchange
    role, called = parse_role(turn, number, notes)
    unknown = turn.keys() - _KNOWN
    if unknown:
        _check_unknown(turn, unknown, number, notes)
    calls, reasoning = read_calls(turn, role, number, notes), _reasoning(turn, number)
    name, content = _content_of(turn, number, optional=bool(calls or reasoning or role == "tool"))
    extra: list[Message] = []
    if isinstance(content, list):
        parts = parse_parts(content, number, notes)
        content, calls, extra = parts.text, (*calls, *parts.calls), parts.results
        reasoning = parts.reasoning if reasoning is None else reasoning
    if isinstance(content, dict) and role == "tool":
        content = write_json(content)
    if not isinstance(content, str):
        raise RecordError("wrong_type", f"{name!r} must be text, it is {type_name(content)} (turn {number})")
    if called and not calls:
        calls, content = call_from_text(content, notes)
    if (calls or reasoning is not None) and role != "assistant":
        what = "tool calls" if calls else "reasoning"
        raise RecordError("unsupported_content", f"a {role} turn with {what} (turn {number})")
    message = Message(
        role,
        content,
        tuple(calls),
        _text(turn, "tool_call_id", number) if role == "tool" else None,
        _text(turn, "name", number),
        reasoning,
        parse_flag(turn, f"turn {number}"),
    )
    if "tool_call_id" in turn and role != "tool":
        notes.unused("tool_call_id in a turn")
    if extra and not content and role != "assistant":
        return [one._replace(train=message.train) for one in extra]
    return [*extra, message]


def parse_role(turn: Fields, number: int, notes: Notes) -> tuple[Role, bool]:
    """The role of a turn, and whether the role says that the content is a call.

    Raises:
        RecordError: there is none, or nobody knows it.
    """
    speaker = next((turn[name] for name in names.ROLE if name in turn), None)
    key = names.normalize_role(speaker) if isinstance(speaker, str) else None
    role = names.ROLES.get(notes.roles.get(key, key)) if key is not None else None
    if role is None:
        known = ", ".join(dict.fromkeys([*notes.roles, *names.ROLES]))
        detail = f"unknown role {reprlib.repr(speaker)} (turn {number}); known: {known}"
        raise RecordError("unknown_role", f"{detail}. Others: data.train[].roles")
    return role, key in names.CALL_ROLES and key not in notes.roles


def _exchange(turn: Fields, notes: Notes) -> list[Message]:
    """A question and its answer in one object, as some files write each round; empty if the turn is nothing like it."""
    asked = next((name for name in names.ASKED if isinstance(turn.get(name), str)), None)
    answered = next((name for name in names.ANSWERED if isinstance(turn.get(name), str)), None)
    if asked is None or answered is None:
        return []
    system = next((name for name in names.SYSTEM if isinstance(turn.get(name), str)), None)
    for name in turn.keys() - {asked, answered, system}:
        notes.unused(f"{name} in a turn")
    start = [Message("system", turn[system])] if system and turn[system] else []
    return [*start, Message("user", turn[asked]), Message("assistant", turn[answered])]


def _check_unknown(turn: Fields, unknown: set[str], number: int, notes: Notes) -> None:
    for name in unknown:
        value = turn[name]
        if name in names.MEDIA and value:
            raise RecordError("unsupported_content", f"{name!r} is not text (turn {number})")
        if value is None or value in ([], "", {}):
            continue
        if names.LOOKS_LIKE_FLAG.search(name) and not isinstance(value, str) and name not in _NO_FLAGS:
            detail = f"{name!r} may say what is trained, and is not understood (turn {number})"
            known = ", ".join((*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS))
            raise RecordError("unknown_flag", f"{detail}; known: {known}")
        notes.unused(f"{name} in a turn")


def _content_of(turn: Fields, number: int, *, optional: bool) -> tuple[str, Any]:
    """The name and the value of a turn's content; "" where it may be absent or null."""
    found = [name for name in names.CONTENT if name in turn and turn[name] is not None]
    for other in found[1:]:
        if turn[other] != turn[found[0]]:
            raise RecordError("wrong_type", f"{found[0]!r} and {other!r} say different things (turn {number})")
    if found:
        return found[0], turn[found[0]]
    present = next((name for name in names.CONTENT if name in turn), None)
    if optional:
        return present or "content", ""
    if present is None:
        raise RecordError("missing_field", f"no field 'content' (turn {number})")
    return present, None


def _reasoning(turn: Fields, number: int) -> str | None:
    found: str | None = None
    for name in names.REASONING:
        text = _text(turn, name, number)
        if text is None:
            continue
        if found is not None and text != found:
            raise RecordError("wrong_type", f"{name!r} and another field of reasoning differ (turn {number})")
        found = text
    return found or None


def _text(turn: Fields, name: str, number: int) -> str | None:
    value = turn.get(name)
    if value is None or isinstance(value, str):
        return value
    raise RecordError("wrong_type", f"{name!r} must be text, it is {type_name(value)} (turn {number})")


def parse_flag(fields: Fields, where: str) -> bool | None:
    """What a turn or a record says about being trained: None if it says nothing.

    Raises:
        RecordError: a value other than true, false, 1 and 0; or two flags that differ.
    """
    found: bool | None = None
    for name in (*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS):
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            expected = "0 or 1" if name in names.TRAIN_WEIGHTS else "true or false"
            shown = reprlib.repr(value)
            raise RecordError("unknown_flag", f"{name!r} must be {expected}, it is {shown} ({where})")
        if found is not None and found != bool(value):
            raise RecordError("unknown_flag", f"{name!r} and another flag contradict each other ({where})")
        found = bool(value)
    return found


class _Parts:
    """What a list of content parts holds, sorted."""

    def __init__(self) -> None:
        self.text = ""
        self.thoughts: list[str] = []
        self.calls: tuple[ToolCall, ...] = ()
        self.results: list[Message] = []

    @property
    def reasoning(self) -> str | None:
        return "\n".join(self.thoughts) or None


def parse_parts(parts: Sequence[object], number: int, notes: Notes) -> _Parts:
    """Text, reasoning, calls and results from the content parts of OpenAI, Anthropic, Bedrock, Gemini, LLaMA-Factory.

    Raises:
        RecordError: a part that is none of these.
    """
    found = _Parts()
    for part in parts:
        if isinstance(part, str):
            found.text += part
            continue
        if not isinstance(part, dict):
            raise RecordError("unsupported_content", f"a content part is {type_name(part)} (turn {number})")
        part = {name: value for name, value in part.items() if value is not None}
        kind = part.get("type") or next((name for name in _PART_KINDS if name in part), None)
        for name in part.keys() - _PART_FIELDS:
            if part[name] not in ([], "", {}):
                notes.unused(f"{name} in a content part")
        if part.get("thought") is True and "text" in part:  # Gemini's thoughts
            found.thoughts.append(_part_text(part, number))
        elif kind in _TEXT_KINDS:
            found.text += _part_text(part, number)
        elif kind in ("thinking", "reasoning"):
            found.thoughts.append(_part_text(part, number))
        elif kind in ("tool_use", "tool_call", "function_call", "toolUse", "functionCall"):
            found.calls += read_calls({"tool_calls": [_part_call(part, kind)]}, "assistant", number, notes)
        elif kind in ("tool_result", "toolResult", "functionResponse"):
            found.results.append(_part_result(part, kind, number, notes))
        else:
            what = reprlib.repr(kind) if kind else f"with {', '.join(part) or 'nothing'}"
            raise RecordError("unsupported_content", f"a content part of type {what} is not text (turn {number})")
    return found


_TEXT_KINDS = ("text", "input_text", "output_text")
_PART_FIELDS = frozenset(
    {
        *("type", "text", "value", "thinking", "reasoning", "content", "thought", "id", "name", "input", "arguments"),
        *("args", "parameters", "call_id", "output", "response", "tool_use_id", "tool_call", "function_call"),
        *("toolUse", "toolResult", "functionCall", "functionResponse", "toolUseId"),
    }
)
_PART_KINDS = ("text", "thinking", "toolUse", "toolResult", "functionCall", "functionResponse")


def _part_text(part: Fields, number: int) -> str:
    for name in ("text", "value", "thinking", "reasoning", "content"):
        if isinstance(text := part.get(name), str):
            return text
    raise RecordError("unsupported_content", f"a content part holds no text (turn {number})")


def _part_call(part: Fields, kind: str) -> Fields:
    inner: Fields = part[kind] if isinstance(part.get(kind), dict) else part
    if isinstance(part.get("value"), str):  # LLaMA-Factory keeps the call as JSON text
        value = parse_text(part["value"])
        inner = value if isinstance(value, dict) else part
    arguments: Any = next((inner[name] for name in ("input", "arguments", "args", "parameters") if name in inner), {})
    call = {"name": inner.get("name"), "arguments": arguments}
    key = next((inner[name] for name in ("id", "toolUseId", "call_id") if name in inner), None)
    return call if key is None else {**call, "id": key}


def _part_result(part: Fields, kind: str, number: int, notes: Notes) -> Message:
    inner: Fields = part[kind] if isinstance(part.get(kind), dict) else part
    content = next((inner[name] for name in ("content", "response", "output") if name in inner), "")
    if isinstance(content, list) and all(isinstance(one, str) or "text" in one for one in content):
        content = parse_parts(content, number, notes).text
    if not isinstance(content, str):
        content = write_json(content)
    key = next((inner[name] for name in ("tool_use_id", "toolUseId", "id", "call_id") if name in inner), None)
    return Message("tool", content, (), key if isinstance(key, str) else None, _text(inner, "name", number))


_LISTED = re.compile(r"\s*[\[{]")


def turn_list(fields: Fields, name: str) -> list[Fields]:
    """A field that must be a list of objects, or JSON text of one.

    Raises:
        RecordError: it is not.
    """
    turns = fields.get(name)
    if isinstance(turns, str) and _LISTED.match(turns):
        try:
            turns = parse_text(turns)
        except ValueError:
            python = "'role'" in turns or "'from'" in turns
            how = "a list of Python, with its quotes, and not JSON" if python else "text, and not JSON"
            raise RecordError("wrong_type", f"{name!r} must be a list of turns, it is {how}") from None
    if not isinstance(turns, list):
        raise RecordError("wrong_type", f"{name!r} must be a list of turns, it is {type_name(turns)}")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RecordError("wrong_type", f"turn {number} must be an object, it is {type_name(turn)}")
    return turns
