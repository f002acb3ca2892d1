"""Lists of turns: OpenAI's `messages`, ShareGPT's `conversations`, and the other names of both."""

from peftchat.conversation import Message
from peftchat.conversations.formats import names
from peftchat.conversations.formats.base import Fields, Notes, record_format
from peftchat.conversations.formats.turns import parse_turns, turn_list


def _list_name(fields: Fields, known: tuple[str, ...]) -> str | None:
    return next((name for name in known if isinstance(fields.get(name), list | str)), None) or next(
        (name for name in known if name in fields), None
    )


def _parse_sharegpt(fields: Fields, notes: Notes) -> list[Message]:
    return parse_turns(turn_list(fields, _list_name(fields, _SHAREGPT) or "conversations"), notes)


_SHAREGPT = names.TURNS[1:]

FORMAT = record_format(
    "messages",
    "messages: a list of {role, content}, with tool_calls, reasoning_content, weight; tools beside it",
    lambda fields: "messages" in fields,
    lambda fields, notes: parse_turns(turn_list(fields, "messages"), notes),
    lambda fields: ("messages",),
)


def _is_sharegpt(fields: Fields) -> bool:
    if "conversations" in fields:
        return True
    # The other names are words that tables use for other things as well.
    name = _list_name(fields, _SHAREGPT)
    value = fields[name] if name else None
    return (isinstance(value, list) and bool(value) and isinstance(value[0], dict)) or (
        isinstance(value, str) and value.lstrip().startswith("[{")
    )


SHAREGPT = record_format(
    "sharegpt",
    "conversations, conversation, dialog …: a list of {from, value}, from human, gpt, system, tool, function_call",
    _is_sharegpt,
    _parse_sharegpt,
    lambda fields: (_list_name(fields, _SHAREGPT) or "",),
)
