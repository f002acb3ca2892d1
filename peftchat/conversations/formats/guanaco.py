"""Guanaco's format: one `text`, `### Human: … ### Assistant: …`."""

import re

from peftchat.conversation import Message, Role
from peftchat.conversations.formats.base import Description, Fields, Notes, record_format, text_field

_MARK = re.compile(r"###\s?(Human|Assistant|System):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant", "System": "system"}


def _matches(fields: Fields) -> bool:
    text = fields.get("text")
    return isinstance(text, str) and "### Human:" in text


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    """Turns without the blanks around them; text before the first mark is a system message.

    Some files end `text` at the last `### Assistant:` and keep the answer in `output`.
    """
    before, *pieces = _MARK.split(text_field(fields, "text"))
    messages = [Message("system", before.strip())] if before.strip() else []
    for name, content in zip(pieces[::2], pieces[1::2], strict=True):
        messages.append(Message(_ROLES[name], content.strip()))
    last = messages[-1]
    if last.role == "assistant" and not last.content and "output" in fields:
        messages[-1] = Message("assistant", text_field(fields, "output").strip())
    elif "output" in fields:
        notes.unused("output")
    return messages


FORMAT = record_format(
    "guanaco",
    Description(
        "text: '### Human: … ### Assistant: …'; an open last answer is in output",
        {
            "text": "the turns, each behind `### Human:`, `### Assistant:` or `### System:`",
            "output": "the last answer, where `text` ends with `### Assistant:`",
        },
        (
            {"text": "### Human: Hi### Assistant: Hello!"},
            {"text": "Be kind. ### Human: Hi ### Assistant:", "output": "Hello!"},
        ),
    ),
    _matches,
    _parse,
    lambda fields: ("text", "output"),
)
