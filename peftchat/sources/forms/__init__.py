"""The registry of input forms; a new form is one file here and one entry in `FORMS`."""

import difflib

from peftchat.errors import UserError
from peftchat.sources.forms import alpaca, guanaco, messages, prompt_completion, sharegpt
from peftchat.sources.forms.form import Fields, Form
from peftchat.sources.oasst import form as oasst

# In the order in which `auto` tries them: those whose fields nobody else uses come first.
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        messages.FORM,
        sharegpt.FORM,
        oasst.FORM,
        guanaco.FORM,
        alpaca.FORM,
        prompt_completion.FORM,
    )
}

__all__ = ["FORMS", "Fields", "Form", "find_form", "list_formats", "matching_form"]


def find_form(name: str) -> Form:
    """The form called `name`.

    Raises:
        InputError: there is none; names the nearest.
    """
    if name in FORMS:
        return FORMS[name]
    nearest = difflib.get_close_matches(name, FORMS, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    raise UserError(f"unknown format {name!r}", cure=f"{hint}Known: auto, {', '.join(FORMS)}.")


def matching_form(fields: Fields) -> Form | None:
    """The first form that a row's fields fit."""
    return next((form for form in FORMS.values() if form.matches(fields)), None)


def list_formats() -> list[tuple[str, str]]:
    """Name and one line for every form, `auto` first."""
    auto = ("auto", "the first of the forms below that the first rows have")
    return [auto, *((form.name, form.summary) for form in FORMS.values())]
