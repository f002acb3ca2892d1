"""The registry of input formats; a new format is one file here and one entry in `FORMATS`."""

import difflib

from peftchat.conversations.formats import (
    alpaca,
    chatgpt_export,
    gemini,
    glaive,
    guanaco,
    messages,
    oasst,
    preference,
    prompt_completion,
    xlam,
)
from peftchat.conversations.formats.base import Fields, Format
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
        guanaco.FORMAT,
        alpaca.FORMAT,
        prompt_completion.FORMAT,
    )
}

__all__ = ["FORMATS", "Fields", "Format", "find_format", "list_formats", "matching_format"]


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


def matching_format(fields: Fields) -> Format | None:
    """The first format that a record's fields fit."""
    return next((data_format for data_format in FORMATS.values() if data_format.matches(fields)), None)


def list_formats() -> list[tuple[str, str]]:
    """Name and one line for every format, `auto` first."""
    auto = ("auto", "the first of the formats below that the first records have")
    return [auto, *((data_format.name, data_format.summary) for data_format in FORMATS.values())]
