"""ShareGPT's format: `conversations`, a list of `{"from", "value"}` (or of `{"role", "content"}`)."""

import reprlib

from peftchat.conversation import Message, Role
from peftchat.conversations.formats.base import Fields, optional_text, record_format, text_field, turn_list
from peftchat.conversations.formats.messages import parse_turns
from peftchat.conversations.problems import RecordError

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _parse(fields: Fields) -> list[Message]:
    turns = turn_list(fields, "conversations")
    if turns and "from" not in turns[0]:
        messages = parse_turns(turns)
    else:
        messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    system = optional_text(fields, "system")
    return [Message("system", system), *messages] if system else messages


def _message(turn: Fields, number: int) -> Message:
    speaker = turn.get("from")
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SPEAKERS)
        raise RecordError("unknown_role", f"unknown speaker {reprlib.repr(speaker)} (turn {number}); known: {known}")
    return Message(role, text_field(turn, "value"))


FORMAT = record_format(
    "sharegpt",
    "conversations: a list of {from, value}, from human, gpt, system, tool",
    lambda fields: "conversations" in fields,
    _parse,
)
