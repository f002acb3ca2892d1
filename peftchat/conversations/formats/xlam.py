"""xLAM's function calling format: `query`, `answers` (calls as JSON) and `tools`."""

from peftchat.conversation import Message
from peftchat.conversations.formats.base import Description, Fields, Notes, record_format, text_field
from peftchat.conversations.formats.calls import read_calls


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    calls = read_calls({"tool_calls": fields["answers"]}, "assistant", 2, notes)
    return [Message("user", text_field(fields, "query")), Message("assistant", "", calls)]


FORMAT = record_format(
    "xlam",
    Description(
        "query, answers (a list of calls, or JSON text of one), tools: xLAM's function calling",
        {
            "query": "the user's message",
            "answers": "the calls: a list of {name, arguments}, also as JSON text",
            "tools": "the definitions of the tools, also as JSON text",
        },
        (
            {
                "query": "Is it warm in Oslo?",
                "answers": [{"name": "weather", "arguments": {"city": "Oslo"}}],
                "tools": [{"name": "weather", "parameters": {"city": {"type": "str"}}}],
            },
            {
                "query": "Wake me at 7.",
                "answers": '[{"name": "alarm", "arguments": {"hour": 7}}]',
                "tools": '[{"name": "alarm", "parameters": {"hour": {"type": "int"}}}]',
            },
        ),
    ),
    lambda fields: {"query", "answers", "tools"} <= fields.keys(),
    _parse,
    lambda fields: ("query", "answers"),
)
