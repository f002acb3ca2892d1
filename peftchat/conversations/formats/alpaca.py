"""Alpaca's format: `instruction`, `input`, `output`, with optional `system` and `history`."""

from peftchat.conversations.formats.base import Description, record_format
from peftchat.conversations.formats.prompt_completion import PAIR_COLUMNS, parse_pair, used_fields

FORMAT = record_format(
    "alpaca",
    Description(
        "instruction, output, optional input (appended to the instruction), system, history",
        {
            "instruction": "the user's message",
            "input": "text that it is about, below it; also `context`",
            "output": "the answer",
            "history": "earlier rounds: a list of [question, answer]",
        },
        (
            {"instruction": "Translate to English.", "input": "Guten Tag", "output": "Good day"},
            {"instruction": "And to French?", "output": "Bonjour", "history": [["Translate: Hallo", "Hello"]]},
        ),
        PAIR_COLUMNS[2:],
        has_roles=True,
    ),
    lambda fields: "instruction" in fields and "output" in fields,
    parse_pair,
    used_fields,
)
