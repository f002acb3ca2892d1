"""Turns: from the objects of a list to messages, whatever names a file uses."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

from peftchat.conversation import Message, Role
from peftchat.conversations.formats import names
from peftchat.conversations.formats.calls import call_from_text, json_text, read_calls
from peftchat.conversations.formats.fields import Fields, Notes, optional_id, parse_text, type_name
from peftchat.conversations.formats.parts import parse_parts
from peftchat.conversations.problems import RecordError

_KNOWN = frozenset(
    {
        *names.ROLE,
        *names.CONTENT,
        *names.REASONING,
        *names.TRAIN_FLAGS,
        *names.TRAIN_WEIGHTS,
        *("tool_calls", "function_call", "tool_call_id", "name", "channel"),
    }
)


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
    """Add a message; a turn that is nothing but calls belongs to the assistant's turn before it.

    So does an answer in a channel of its own to the analysis before it.
    """
    before = messages[-1] if messages else None
    if before is not None and "channel" in turn and _continues(before, message):
        messages[-1] = message._replace(reasoning=before.reasoning)
        return
    calls_only = message.tool_calls and not message.content and _role_name(turn) in names.CALL_ROLES
    if before is None or not calls_only or before.role != "assistant" or before.train is not message.train:
        messages.append(message)
    else:
        messages[-1] = before._replace(tool_calls=before.tool_calls + message.tool_calls)


def _continues(before: Message, message: Message) -> bool:
    """Whether a turn is the answer to the reasoning before it."""
    reasoning_only = before.role == "assistant" and before.reasoning and not before.content and not before.tool_calls
    answers = message.role == "assistant" and message.reasoning is None and message.train is before.train
    return bool(reasoning_only and answers)


def _role_name(turn: Fields) -> str:
    found = next((turn[name] for name in names.ROLE if name in turn), "")
    return names.normalize_role(found) if isinstance(found, str) else ""


_INNER_TURNS = ("data", "kwargs")


def _of_langchain(turn: Fields) -> Fields:
    """Return a turn of LangChain, whose `type` is its role, in the usual form; any other as it is.

    Its fields may stand below `data` (`messages_to_dict`) or `kwargs` (`dumps`).
    """
    inner = next((turn[name] for name in _INNER_TURNS if isinstance(turn.get(name), dict)), turn)
    role = turn["type"] if inner.get("type") is None else inner["type"]
    if not isinstance(role, str) or names.normalize_role(role) not in names.ROLES or "content" not in inner:
        return turn
    return {"role": role, **{name: value for name, value in inner.items() if name != "type"}}


def _messages(turn: Fields, number: int, notes: Notes) -> list[Message]:
    if "type" in turn and not any(name in turn for name in names.ROLE):
        turn = _of_langchain(turn)
    if not any(name in turn for name in names.ROLE):
        exchange = _exchange(turn, number, notes)
        if exchange:
            return exchange
    role, called = parse_role(turn, number, notes)
    unknown = turn.keys() - _KNOWN
    if unknown:
        _check_unknown(turn, unknown, number, notes)
    calls, reasoning = read_calls(turn, role, number, notes), _reasoning(turn, number)
    name, content = _content_of(turn, number, optional=bool(calls or reasoning or role == "tool"))
    if "channel" in turn:
        if turn["channel"] == "analysis" and role == "assistant" and isinstance(content, str) and reasoning is None:
            content, reasoning = "", content or None
        elif turn["channel"] != "final":
            notes.unused_of({"channel": turn["channel"]}, (), "a turn")
    extra: list[Message] = []
    if isinstance(content, list):
        parts = parse_parts(content, number, notes)
        content, calls, extra = parts.text, (*calls, *parts.calls), parts.results
        if reasoning is not None and parts.reasoning not in (None, reasoning):
            raise RecordError("wrong_type", f"two texts of reasoning that differ (turn {number})")
        reasoning = parts.reasoning if reasoning is None else reasoning
    if isinstance(content, dict) and role == "tool":
        content = json_text(content, f"a result (turn {number})", notes)
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
        optional_id(turn, ("tool_call_id",), f"turn {number}") if role == "tool" else None,
        _text(turn, "name", number),
        reasoning,
        parse_flag(turn, f"turn {number}"),
    )
    if "tool_call_id" in turn and role != "tool":
        notes.unused("tool_call_id in a turn")
    if extra and not content and role != "assistant":
        notes.unused_of({"name": message.name, "tool_call_id": message.tool_call_id}, (), "a turn")
        return [one._replace(train=message.train) for one in extra]
    return [*extra, message]


def parse_role(turn: Fields, number: int, notes: Notes) -> tuple[Role, bool]:
    """The role of a turn, and whether the role says that the content is a call.

    Raises:
        RecordError: there is none, or nobody knows it.
    """
    spelled = next((name for name in names.ROLE if name in turn), None)
    speaker = turn[spelled] if spelled is not None else None
    key = names.normalize_role(speaker) if isinstance(speaker, str) else None
    role = names.ROLES.get(notes.roles.get(key, key)) if key is not None else None
    if role is None:
        known = ", ".join(dict.fromkeys([*notes.roles, *names.ROLES]))
        detail = f"unknown role {reprlib.repr(speaker)} (turn {number}); known: {known}"
        raise RecordError("unknown_role", f"{detail}. Others: data.train[].roles, or --roles")
    for name in names.ROLE:
        if name != spelled and name in turn:
            _check_second_role(turn, name, role, number, notes)
    return role, key in names.CALL_ROLES and key not in notes.roles


def _check_second_role(turn: Fields, name: str, role: Role, number: int, notes: Notes) -> None:
    """Check that another field of a turn does not name another role; what it says otherwise is told."""
    value = turn[name]
    key = names.normalize_role(value) if isinstance(value, str) else ""
    other = names.ROLES.get(notes.roles.get(key, key))
    if other is None:
        notes.unused_of({name: value}, (), "a turn")
    elif other != role:
        raise RecordError(
            "unknown_role", f"the turn has two roles: {role!r} and, in {name!r}, {other!r} (turn {number})"
        )


def _exchange(turn: Fields, number: int, notes: Notes) -> list[Message]:
    """A question and its answer in one object, as some files write each round; empty if the turn is nothing like it."""
    asked = next((name for name in names.ASKED if isinstance(turn.get(name), str)), None)
    answered = next((name for name in names.ANSWERED if isinstance(turn.get(name), str)), None)
    if asked is None or answered is None:
        return []
    system, where = next((name for name in names.SYSTEM if isinstance(turn.get(name), str)), None), f"turn {number}"
    flags = (*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS)
    notes.unused_of(turn, (asked, answered, system or "", *flags, *names.REASONING), "a turn")
    start = [Message("system", turn[system])] if system and turn[system] else []
    answer = Message("assistant", turn[answered], (), None, None, _reasoning(turn, number), parse_flag(turn, where))
    return [*start, Message("user", turn[asked]), answer]


def _check_unknown(turn: Fields, unknown: set[str], number: int, notes: Notes) -> None:
    for name, value in turn.items():
        if name not in unknown:
            continue
        if name in names.MEDIA and value:
            raise RecordError("unsupported_content", f"{name!r} is not text (turn {number})")
        if value is None or value in ("", [], {}):
            continue
        if names.LOOKS_LIKE_FLAG.search(name) and not isinstance(value, str):
            detail = f"{name!r} may say what is trained, and is not understood (turn {number})"
            known = ", ".join((*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS))
            raise RecordError("unknown_flag", f"{detail}; known: {known}")
        notes.unused(f"{name} in a turn")


def _content_of(turn: Fields, number: int, *, optional: bool) -> tuple[str, Any]:
    """The name and the value of a turn's content; "" where it may be absent or null."""
    found = [name for name in names.CONTENT if name in turn and turn[name] is not None]
    for other in found[1:]:
        if turn[other] != turn[found[0]] and not _is_text_of(turn[found[0]], turn[other]):
            raise RecordError("wrong_type", f"{found[0]!r} and {other!r} say different things (turn {number})")
    if found:
        return found[0], turn[found[0]]
    present = next((name for name in names.CONTENT if name in turn), None)
    if optional:
        return present or "content", ""
    if turn.get("refusal"):
        detail = f"no content, and a 'refusal' (turn {number}); write the refusal as the content to train it"
        raise RecordError("missing_field", detail)
    if present is None:
        raise RecordError("missing_field", f"no field 'content' (turn {number})")
    return present, None


def _is_text_of(parts: object, text: object) -> bool:
    """Whether a text repeats that of content parts, as in the export of Claude."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return False
    return "".join(str(part.get("text", "")) for part in parts) == text


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


_HH_MARK = re.compile(r"\n\n(Human|Assistant):")
_OPEN_PROMPT = re.compile(r"\s*Human:.*\nAssistant:\s*\Z", re.DOTALL)
_LINE_MARK = re.compile(r"\n(Human|Assistant):")
_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def turns_of_text(text: str) -> list[Message] | None:
    """The turns of `Human: …`, blank line, `Assistant: …`: Anthropic's preference sets; None for any other text.

    A text that ends with `Assistant:` is a prompt, so that its last turn is the user's. Its turns may stand line
    below line, as in BELLE's.
    """
    text = f"\n\n{text.lstrip()}"
    start, *pieces = _HH_MARK.split(text)
    if len(pieces) < 4 and _OPEN_PROMPT.match(text):
        start, *pieces = _LINE_MARK.split(text[1:])
    if start or len(pieces) < 4 or pieces[0] != "Human":
        return None
    turns = [Message(_HH_ROLES[name], said.strip()) for name, said in zip(pieces[::2], pieces[1::2], strict=True)]
    return turns if turns[-1].content else turns[:-1]


_LISTED = re.compile(r'\s*[\[{"]')
_MOST_OFTEN_ENCODED = 2
_OBJECTS = {dict}


def turn_list(fields: Fields, name: str) -> list[Fields]:
    """A field that must be a list of objects, or JSON text of one.

    Raises:
        RecordError: it is not.
    """
    turns = fields.get(name)
    if type(turns) is list and {*map(type, turns)} == _OBJECTS:
        return turns
    for _ in range(_MOST_OFTEN_ENCODED):
        if not isinstance(turns, str) or not _LISTED.match(turns):
            break
        try:
            turns = parse_text(turns)
        except ValueError:
            python = "'role'" in turns or "'from'" in turns
            how = (
                "a list of Python, with its quotes, and not JSON; write it with json.dumps"
                if python
                else "text, and not JSON"
            )
            raise RecordError("wrong_type", f"{name!r} must be a list of turns, it is {how}") from None
    if not isinstance(turns, list):
        raise RecordError("wrong_type", f"{name!r} must be a list of turns, it is {type_name(turns)}")
    for turn in turns:
        if not isinstance(turn, dict):
            return _opened(turns, name)
    return turns


def _opened(turns: Sequence[object], name: str) -> list[Fields]:
    """Turns of which some are JSON text, as tables without a type for them hold turns."""
    opened: list[Fields] = []
    for number, turn in enumerate(turns, start=1):
        value = _turn_of_text(turn) if isinstance(turn, str) else turn
        if not isinstance(value, dict):
            detail = f"{name!r} must hold one text or turns; its entry {number} is {type_name(value)} and no object"
            raise RecordError("wrong_type", detail)
        opened.append(value)
    return opened


def _turn_of_text(turn: str) -> object:
    """The turn that a text is in JSON, or the text."""
    try:
        return parse_text(turn) if _LISTED.match(turn) else turn
    except ValueError:
        return turn
