"""Gemini's tuning files: `contents`, a list of `{"role", "parts"}`, with `systemInstruction`."""

from peftchat.conversation import Message
from peftchat.conversations.formats.base import Description, Fields, Notes, record_format
from peftchat.conversations.formats.turns import parse_turns, turn_list
from peftchat.conversations.problems import RecordError


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    turns = turn_list(fields, "contents")
    for number, turn in enumerate(turns, start=1):
        if "parts" in turn and turn.get("content") is not None:
            raise RecordError("wrong_type", f"'parts' and 'content' in one turn (turn {number})")
    return parse_turns(
        [
            {
                "content" if name == "parts" else name: turn[name]
                for name in turn
                if "parts" not in turn or name != "content"
            }
            for turn in turns
        ],
        notes,
    )


FORMAT = record_format(
    "gemini",
    Description(
        "contents: a list of {role, parts}, optional systemInstruction",
        {
            "contents": "the turns; a part is text, a functionCall or a functionResponse",
            "systemInstruction": "the system message",
        },
        (
            {
                "contents": [
                    {"role": "user", "parts": [{"text": "Hi"}]},
                    {"role": "model", "parts": [{"text": "Hello!"}]},
                ]
            },
            {
                "systemInstruction": {"parts": [{"text": "Be kind."}]},
                "contents": [
                    {"role": "user", "parts": [{"text": "Is it warm?"}]},
                    {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"city": "Oslo"}}}]},
                    {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"degrees": 21}}}]},
                    {"role": "model", "parts": [{"text": "Yes."}]},
                ],
            },
        ),
        has_roles=True,
    ),
    lambda fields: isinstance(fields.get("contents"), list),
    _parse,
    lambda fields: ("contents",),
)
