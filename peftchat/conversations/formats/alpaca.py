"""Alpaca's format: `instruction`, `input`, `output`, with optional `system` and `history`."""

from peftchat.conversations.formats.base import record_format
from peftchat.conversations.formats.prompt_completion import parse_pair, used_fields

FORMAT = record_format(
    "alpaca",
    "instruction, output, optional input (appended to the instruction), system, history",
    lambda fields: "instruction" in fields and "output" in fields,
    parse_pair,
    used_fields,
)
