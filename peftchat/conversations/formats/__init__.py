"""The registry of input formats; a new format is one file here and one entry in `FORMATS`."""

import difflib
from typing import Any

from peftchat.conversations.formats import (
    alpaca,
    chatgpt_export,
    gemini,
    glaive,
    guanaco,
    messages,
    names,
    oasst,
    preference,
    prompt_completion,
    self_instruct,
    templated_text,
    xlam,
)
from peftchat.conversations.formats.base import Fields, Format, known_shape
from peftchat.conversations.formats.pairs import without_turns
from peftchat.errors import UserError

# In the order in which `auto` tries them: those whose fields nobody else uses come first.
FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        messages.FORMAT,
        messages.SHAREGPT,
        oasst.FORMAT,
        chatgpt_export.FORMAT,
        gemini.FORMAT,
        glaive.FORMAT,
        xlam.FORMAT,
        preference.FORMAT,
        self_instruct.FORMAT,
        guanaco.FORMAT,
        alpaca.FORMAT,
        prompt_completion.FORMAT,
        templated_text.FORMAT,
    )
}

__all__ = [
    "FORMATS",
    "SHARED_FIELDS",
    "Fields",
    "Format",
    "describe_formats",
    "find_format",
    "list_formats",
    "matching_format",
]


def find_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name in FORMATS:
        return FORMATS[name]
    nearest = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    raise UserError(f"unknown format {name!r}", hint=f"{hint}Known: auto, {', '.join(FORMATS)}.")


def matching_format(fields: Fields, *, pairs: bool = False) -> Format | None:
    """The first format that a record's fields fit.

    With `pairs`, a list of turns that repeats the chosen conversation does not count.
    """
    fields = known_shape(dict(fields))
    fields = without_turns(fields) if pairs else fields
    return next((data_format for data_format in FORMATS.values() if data_format.matches(fields)), None)


def describe_formats(name: str | None = None) -> dict[str, dict[str, Any]]:
    """Everything that users should know of each format, or of one: summary, fields, names for `columns`, two examples.

    Raises:
        UserError: there is no format of that name.
    """
    chosen = FORMATS.values() if name is None else (find_format(name),)
    return {
        one.name: {
            "summary": one.summary,
            "fields": dict(one.description.fields),
            "columns": list(one.columns),
            "examples": list(one.description.examples),
        }
        for one in chosen
    }


SHARED_FIELDS: dict[str, str] = {
    "system": f"the system message, put before the turns; also {', '.join(names.SYSTEM[1:])}",
    "tools": "definitions of the functions that the assistant may call; also functions, or JSON text of either",
    "loss_mask": f"a list of 0 and 1 for each turn or answer: what is trained; also {', '.join(names.TURN_MASKS[1:])}",
    "train": "false leaves the record out, and counts it; also loss, trainable, weight with 0 or 1",
    "chosen": "the preferred answer to the turns; `rejected` is used by objectives with pairs alone",
    "label": "false leaves the record out, and counts it",
}
"""Fields that mean the same in every format with one conversation per record."""


def list_formats() -> list[tuple[str, str]]:
    """Name and one line for every format, `auto` first."""
    auto = ("auto", "the first of the formats below that the first records have")
    return [auto, *((data_format.name, data_format.summary) for data_format in FORMATS.values())]
