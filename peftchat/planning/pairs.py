"""Pairs in a plan: how they are laid out, and what of them a step computes."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from peftchat.chat_template.examples import ExampleStore
    from peftchat.recipe import Recipe

PairLayout = Literal["rows", "lines", "shared"]
"""How a forward pass has the two answers of a pair.

- `rows`: each in a row of its own, padded.
- `lines`: side by side, each behind its prompt.
- `shared`: side by side, behind one prompt.
"""


def pair_lengths(recipe: "Recipe", store: "ExampleStore", layout: PairLayout) -> "tuple[npt.NDArray[np.int64], int]":
    """Return the tokens that a trained pass computes of each pair, and those of its longest row or line.

    Args:
        recipe: the recipe.
        store: the examples, two for each pair.
        layout: see `PairLayout`.
    """
    import numpy as np

    from peftchat.chat_template.loss_mask import loss_mask_table
    from peftchat.dataset.pairs import shared_tokens

    lengths = np.asarray(store.lengths)
    if recipe.has_labels:
        # The answers to other prompts are computed in a pass without gradients.
        return lengths[::2], int(lengths[::2].max())
    pairs = lengths[::2] + lengths[1::2]
    if layout == "rows":
        return pairs, int(lengths.max())
    if layout == "shared":
        mask = loss_mask_table(recipe.chat.loss_policy)
        shared = [shared_tokens(store[first], store[first + 1], mask) for first in range(0, len(store), 2)]
        pairs = pairs - np.array(shared, dtype=np.int64)
    return pairs, int(pairs.max())


def rows_of_pair(recipe: "Recipe", layout: PairLayout) -> int:
    """Return the rows of a forward pass that a pair takes."""
    return 2 if layout == "rows" and not recipe.has_labels else 1


def longest_row(recipe: "Recipe", layout: PairLayout) -> int:
    """Return the most tokens of a row or line of a pair."""
    answers = 1 if layout == "rows" or recipe.has_labels else 2
    return answers * recipe.data.max_length


def passes_without_gradient(recipe: "Recipe", tokens: int, tokens_per_epoch: int | None) -> int:
    """Return the tokens that passes without a gradient compute in a run.

    The reference computes each answer once, and `kto` answers to other prompts in every step.

    Args:
        recipe: the recipe.
        tokens: those of all steps.
        tokens_per_epoch: those of an epoch; None if the data was not read.
    """
    if not recipe.has_reference:
        return 0
    once = tokens if tokens_per_epoch is None else min(tokens, tokens_per_epoch)
    return 2 * once + tokens if recipe.has_labels else once
