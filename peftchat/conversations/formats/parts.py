"""Content parts, as OpenAI, Anthropic, Bedrock, Gemini and LLaMA-Factory write them."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peftchat.conversation import Message, ToolCall
from peftchat.conversations.formats.calls import json_text, read_calls
from peftchat.conversations.formats.fields import Fields, Notes, optional_id, parse_text, type_name
from peftchat.conversations.problems import RecordError

_TEXT_KINDS = ("text", "input_text", "output_text")
_REASONING_KINDS = ("thinking", "reasoning")
_CALL_KINDS = ("tool_use", "tool_call", "function_call", "toolUse", "functionCall")
_RESULT_KINDS = ("tool_result", "toolResult", "functionResponse")
_PART_KINDS = ("text", "thinking", "toolUse", "toolResult", "functionCall", "functionResponse")
"""Names of fields that say what a part without a `type` is."""
_TEXT_NAMES = ("text", "value", "thinking", "reasoning", "content")
_ARGUMENT_NAMES = ("input", "arguments", "args", "parameters")
_RESULT_NAMES = ("content", "response", "output")
_CALL_IDS = ("id", "toolUseId", "call_id")
_RESULT_IDS = ("tool_use_id", "toolUseId", "id", "call_id")
_PART = "a content part"


@dataclass(slots=True)
class Parts:
    """What a list of content parts holds, sorted.

    Attributes:
        text: of all parts of text, one behind the other.
        thoughts: the reasoning.
        calls: of tools.
        results: of calls, as turns of their own.
    """

    text: str = ""
    thoughts: list[str] = field(default_factory=list)
    calls: tuple[ToolCall, ...] = ()
    results: list[Message] = field(default_factory=list)

    @property
    def reasoning(self) -> str | None:
        """The reasoning, None if there is none."""
        return "\n".join(self.thoughts) or None


def parse_parts(parts: Sequence[object], number: int, notes: Notes) -> Parts:
    """Sort the content parts of a turn.

    Raises:
        RecordError: a part that is no text, reasoning, call or result.
    """
    found = Parts()
    for part in parts:
        if isinstance(part, str):
            found.text += part
            continue
        if not isinstance(part, dict):
            raise RecordError("unsupported_content", f"a content part is {type_name(part)} (turn {number})")
        part = {name: value for name, value in part.items() if value is not None}
        kind = part.get("type") or next((name for name in _PART_KINDS if name in part), None)
        if kind == "text" and part.get("thought") is True:  # Gemini's thoughts
            found.thoughts.append(_text({**part, "thought": None}, number, notes))
        elif kind in _TEXT_KINDS:
            found.text += _text(part, number, notes)
        elif kind in _REASONING_KINDS:
            found.thoughts.append(_text(part, number, notes))
        elif kind in _CALL_KINDS:
            found.calls += read_calls(
                {"tool_calls": [_call(part, str(kind), number, notes)]}, "assistant", number, notes
            )
        elif kind in _RESULT_KINDS:
            found.results.append(_result(part, str(kind), number, notes))
        else:
            what = reprlib.repr(kind) if kind else f"with {', '.join(part) or 'nothing'}"
            raise RecordError("unsupported_content", f"a content part of type {what} is not text (turn {number})")
    return found


def text_of_parts(parts: Sequence[object], number: int, notes: Notes) -> str:
    """Return the text of content parts, where there can be nothing else.

    Raises:
        RecordError: there is.
    """
    found = parse_parts(parts, number, notes)
    if found.calls or found.results or found.thoughts:
        raise RecordError("unsupported_content", f"a content part is no text, where text is expected (turn {number})")
    return found.text


def _text(part: Fields, number: int, notes: Notes) -> str:
    for name in _TEXT_NAMES:
        if isinstance(text := part.get(name), str):
            notes.unused_of(part, ("type", name), _PART)
            return text
    raise RecordError("unsupported_content", f"a content part holds no text (turn {number})")


def _inner(part: Fields, kind: str, notes: Notes) -> Fields:
    """The object that describes a call or a result: the part itself, or the one below the name of its kind."""
    inner = part.get(kind)
    if not isinstance(inner, dict):
        return part
    notes.unused_of(part, ("type", kind), _PART)
    return inner


def _call(part: Fields, kind: str, number: int, notes: Notes) -> Fields:
    inner = _inner(part, kind, notes)
    if isinstance(text := part.get("value"), str):  # LLaMA-Factory keeps the call as JSON text
        try:
            value = parse_text(text)
        except ValueError:
            raise RecordError("not_json", f"a tool call that is not JSON (turn {number})") from None
        if not isinstance(value, dict):
            raise RecordError("wrong_type", f"a tool call must be an object, it is {type_name(value)} (turn {number})")
        notes.unused_of(part, ("type", "value"), _PART)
        inner = value
    spelled = next((name for name in _ARGUMENT_NAMES if name in inner), None)
    arguments: Any = {} if spelled is None else inner[spelled]
    call = {"name": inner.get("name"), "arguments": arguments}
    key = next((name for name in _CALL_IDS if name in inner), None)
    notes.unused_of(inner, ("type", "name", spelled or "", key or ""), _PART)
    return call if key is None else {**call, "id": inner[key]}


def _result(part: Fields, kind: str, number: int, notes: Notes) -> Message:
    inner = _inner(part, kind, notes)
    spelled = next((name for name in _RESULT_NAMES if name in inner), "")
    content = inner.get(spelled, "")
    if isinstance(content, list) and all(isinstance(one, str) or _is_part(one) for one in content):
        content = text_of_parts(content, number, notes)
    if not isinstance(content, str):
        content = json_text(content, f"a result (turn {number})", notes)
    name = inner.get("name")
    if name is not None and not isinstance(name, str):
        raise RecordError("wrong_type", f"'name' must be text, it is {type_name(name)} (turn {number})")
    key = next((name for name in _RESULT_IDS if inner.get(name) is not None), "")
    notes.unused_of(inner, ("type", "name", spelled, key), _PART)
    return Message("tool", content, (), optional_id(inner, (key,), f"turn {number}"), name)


def _is_part(value: object) -> bool:
    return isinstance(value, dict) and ("type" in value or "text" in value)
