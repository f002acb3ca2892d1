"""Objectives as candidates of a comparison: which can be compared, and what belongs to one of them alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftchat.comparing.candidates import OBJECTIVE, is_of_all
from peftchat.errors import UserError
from peftchat.recipe.objectives import LABEL_OBJECTIVES

if TYPE_CHECKING:
    from peftchat.comparing.candidates import Axis
    from peftchat.comparing.hyperparameter_search import Range
    from peftchat.recipe import LoadedRecipe, Recipe


def written_format(recipe: "Recipe") -> str:
    """Return the format of the files that a comparison's data is written to."""
    return "preference" if recipe.answers_read["pairs"] else "messages"


def first_objective(axes: "Sequence[Axis]") -> dict[str, Any]:
    """Return the setting of the first of several objectives: what candidates share is read from its recipe."""
    return {axis.key: axis.values[0] for axis in axes if axis.key == OBJECTIVE and len(axis.values) > 1}


def check_objectives(base: "LoadedRecipe", axes: "Sequence[Axis]", ranges: "Sequence[Range]") -> None:
    """Check that candidates can be judged by one measure, and the trials of each by one loss.

    Raises:
        UserError: some objectives learn from other data, or a range changes the loss that selects among its values.
    """
    for axis in axes:
        if axis.key == OBJECTIVE and len(axis.values) > 1:
            _check_alike(axis.values)
    for searched in ranges:
        if not is_of_all(searched.key):
            raise UserError(
                "trials are selected by held-out loss, and this key changes what the loss is",
                where=f"--search {searched.key}",
                hint=f"Give a few values, which are then candidates: `--set {searched.key}={searched.low:g},"
                f"{searched.high:g}`. They are compared by pairs that are right.",
            )


def _check_alike(objectives: Sequence[Any]) -> None:
    """Refuse objectives that learn from other data than the others."""
    others = {name: "learns from conversations" for name in objectives if name == "sft"}
    others |= {name: "learns from labeled answers" for name in objectives if name in LABEL_OBJECTIVES}
    if others:
        told = " and ".join(f"`{name}` {reason}" for name, reason in others.items())
        names = [name for name in objectives if name not in others]
        raise UserError(
            f"objectives are compared by the same held-out pairs, and {told}",
            where=f"--set {OBJECTIVE}",
            hint=f"Compare {', '.join(names)} here, and {', '.join(others)} in a comparison of its own."
            if names
            else f"Compare each in a comparison of its own: `--set {OBJECTIVE}={objectives[0]}`.",
        )
