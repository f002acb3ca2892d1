"""The registry of input forms; a new form is one file here and one entry in `FORMATS`."""

import difflib

from peftchat.conversations.formats import alpaca, chatgpt_export, guanaco, messages, oasst, prompt_completion, sharegpt
from peftchat.conversations.formats.base import Fields, Format
from peftchat.errors import UserError

# In the order in which `auto` tries them: those whose fields nobody else uses come first.
FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        messages.FORMAT,
        sharegpt.FORMAT,
        oasst.FORMAT,
        chatgpt_export.FORMAT,
        guanaco.FORMAT,
        alpaca.FORMAT,
        prompt_completion.FORMAT,
    )
}

__all__ = ["FORMATS", "Fields", "Format", "find_format", "list_formats", "matching_format"]


def find_format(name: str) -> Format:
    """The form called `name`.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name in FORMATS:
        return FORMATS[name]
    nearest = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    raise UserError(f"unknown format {name!r}", hint=f"{hint}Known: auto, {', '.join(FORMATS)}.")


def matching_format(fields: Fields) -> Format | None:
    """The first form that a row's fields fit."""
    return next((form for form in FORMATS.values() if form.matches(fields)), None)


def list_formats() -> list[tuple[str, str]]:
    """Name and one line for every form, `auto` first."""
    auto = ("auto", "the first of the forms below that the first rows have")
    return [auto, *((form.name, form.summary) for form in FORMATS.values())]
