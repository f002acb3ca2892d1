"""Glaive's function calling format: `system` and `chat`, one text with `USER:`, `ASSISTANT:`, `FUNCTION RESPONSE:`."""

import json
import re

from peftchat.conversation import Message, Role, ToolCall
from peftchat.conversations.formats.base import Description, Fields, Notes, optional_text, record_format, text_field
from peftchat.conversations.formats.calls import read_calls
from peftchat.conversations.formats.fields import parse_text
from peftchat.conversations.problems import RecordError
from peftchat.json_text import normalize_json

_MARK = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_ROLES: dict[str, Role] = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_END = "<|endoftext|>"
_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*\Z", re.DOTALL)
# The arguments are JSON within single quotes, which no JSON parser reads.
_QUOTED = re.compile(r'\{\s*"name":\s*("(?:[^"\\]|\\.)*"),\s*"arguments":\s*\'(.*)\'\s*\}\Z', re.DOTALL)


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
            if "<functioncall>" in content and name == "ASSISTANT":
                notes.change("call_that_is_not_json")
            messages.append(Message(_ROLES[name], content))
        else:
            messages.append(Message("assistant", content[: call.start()].strip(), (_call(call.group(1), notes),)))
    return messages


def _call(text: str, notes: Notes) -> ToolCall:
    try:
        if quoted := _QUOTED.match(text):
            name, arguments = json.loads(quoted.group(1)), quoted.group(2).replace("\\'", "'")
            normalize_json(arguments)
            return ToolCall(name, arguments, None, True)
        value = parse_text(text)
    except ValueError:
        raise RecordError("not_json", "a <functioncall> that is not JSON") from None
    (call,) = read_calls({"tool_calls": [value]}, "assistant", 0, notes)
    return call


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
