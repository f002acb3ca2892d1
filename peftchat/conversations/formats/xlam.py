"""xLAM's function calling format: `query`, `answers` (calls as JSON) and `tools`."""

from peftchat.conversation import Message
from peftchat.conversations.formats.base import Fields, Notes, record_format, text_field
from peftchat.conversations.formats.calls import read_calls


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    calls = read_calls({"tool_calls": fields["answers"]}, "assistant", 2, notes)
    return [Message("user", text_field(fields, "query")), Message("assistant", "", calls)]


FORMAT = record_format(
    "xlam",
    "query, answers (a list of calls, or JSON text of one), tools: xLAM's function calling",
    lambda fields: {"query", "answers", "tools"} <= fields.keys(),
    _parse,
    lambda fields: ("query", "answers"),
)
