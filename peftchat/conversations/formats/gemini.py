"""Gemini's tuning files: `contents`, a list of `{"role", "parts"}`, with `systemInstruction`."""

from peftchat.conversation import Message
from peftchat.conversations.formats.base import Fields, Notes, record_format
from peftchat.conversations.formats.turns import parse_turns, turn_list


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    turns = turn_list(fields, "contents")
    return parse_turns([{"content" if name == "parts" else name: turn[name] for name in turn} for turn in turns], notes)


FORMAT = record_format(
    "gemini",
    "contents: a list of {role, parts}, optional systemInstruction",
    lambda fields: isinstance(fields.get("contents"), list),
    _parse,
    lambda fields: ("contents",),
)
