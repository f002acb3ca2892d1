"""Which learning rates a variant is tried at: the fair rate of one is no fair rate of another."""

from typing import TYPE_CHECKING

from peftchat.comparing.candidates import Candidate
from peftchat.variants import get_variant

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe

SPREAD = (1 / 3, 1.0, 3.0)
"""Factors around the rate that is expected to suit."""


def expected_rate(candidate: Candidate, loaded: "LoadedRecipe") -> float:
    """The rate that is likely to suit a candidate.

    It is the customary one of its variant. A recipe that gives a rate of its own knows something about its model and
    data, so the customary rate is then scaled by as much as the recipe's departs from its own variant's.

    Args:
        loaded: the recipe that all candidates start from.
    """
    recipe = loaded.recipe
    hint = get_variant(candidate.variant).learning_rate
    if loaded.document.value(("training", "learning_rate")) is None:
        return hint
    own = "full" if recipe.adapter is None else recipe.adapter.variant
    return _round(recipe.training.learning_rate * hint / get_variant(own).learning_rate)


def grid(rate: float) -> tuple[float, ...]:
    """Three rates around `rate`, to two digits, rising."""
    return tuple(_round(rate * factor) for factor in SPREAD)


def _round(rate: float) -> float:
    return float(f"{rate:.1e}")
