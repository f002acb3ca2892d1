"""Glaive's function calling format: `system` and `chat`, one text with `USER:`, `ASSISTANT:`, `FUNCTION RESPONSE:`."""

import json
import re

from peftchat.conversation import Message, Role, ToolCall
from peftchat.conversations.formats.base import Description, Fields, Notes, optional_text, record_format, text_field
from peftchat.conversations.problems import RecordError
from peftchat.json_text import normalize_json

_MARK = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_ROLES: dict[str, Role] = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_END = "<|endoftext|>"
_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*\Z", re.DOTALL)
# The arguments are JSON within single quotes, which no JSON parser reads.
_QUOTED = re.compile(r'"name":\s*("(?:[^"\\]|\\.)*"),\s*"arguments":\s*\'(.*)\'\s*\}\Z', re.DOTALL)


def _matches(fields: Fields) -> bool:
    chat = fields.get("chat")
    return isinstance(chat, str) and _MARK.search(chat) is not None


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    system = optional_text(fields, "system").removeprefix("SYSTEM:").strip()
    before, *pieces = _MARK.split(text_field(fields, "chat"))
    if before.strip():
        raise RecordError("wrong_type", "'chat' begins with text that no speaker says")
    messages = [Message("system", system)] if system else []
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        content = text.strip().removesuffix(_END).strip()
        call = _CALL.search(content) if name == "ASSISTANT" else None
        if call is None:
            messages.append(Message(_ROLES[name], content))
        else:
            messages.append(Message("assistant", content[: call.start()].strip(), (_call(call.group(1)),)))
    return messages


def _call(text: str) -> ToolCall:
    try:
        if quoted := _QUOTED.search(text):
            name, arguments = json.loads(quoted.group(1)), quoted.group(2).replace("\\'", "'")
            normalize_json(arguments)
            return ToolCall(name, arguments, None, True)
        value = json.loads(text)
        arguments = value.get("arguments", {})
        as_text = isinstance(arguments, str)
        return ToolCall(value["name"], normalize_json(arguments if as_text else json.dumps(arguments)), None, as_text)
    except (ValueError, KeyError, AttributeError):
        raise RecordError("not_json", "a <functioncall> that is not JSON") from None


FORMAT = record_format(
    "glaive",
    Description(
        "system, chat: one text 'USER: … ASSISTANT: … FUNCTION RESPONSE: …' (Glaive's function calling)",
        {
            "system": "the system message behind `SYSTEM:`, with the tools as its text",
            "chat": "the turns; `<functioncall>` and a JSON object in an answer is a call",
        },
        (
            {"system": "SYSTEM: Be kind.", "chat": "USER: Hi\n\n\nASSISTANT: Hello! <|endoftext|>"},
            {
                "chat": "USER: Is it warm?\n\n\nASSISTANT: <functioncall> "
                '{"name": "weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>\n\n\n'
                "FUNCTION RESPONSE: 21\n\n\nASSISTANT: Yes. <|endoftext|>"
            },
        ),
    ),
    _matches,
    _parse,
    lambda fields: ("system", "chat"),
)
