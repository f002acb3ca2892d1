"""What a run works through: read from local data, else taken from the recipe's own numbers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from peftchat.chat_template.registry import ChatFormat
    from peftchat.dataset.cache import EncodedSplit
    from peftchat.planning.settings import PlanSettings
    from peftchat.recipe import Recipe

_READ_AT_MOST = 64_000_000
"""Bytes of data files that are encoded for a plan; larger sets count only if their rows are cached already."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows of a recipe.

    Attributes:
        sequences: rows or packs an epoch.
        tokens: tokens an epoch, padding not counted.
        longest: tokens of the longest row or pack.
        dialogue: tokens of the dialogue that a usual token belongs to.
        supervised: share of tokens with a target.
        new_tokens: rows that the template adds to this tokenizer.
    """

    sequences: int
    tokens: int
    longest: int
    dialogue: int
    supervised: float
    new_tokens: int


def read_workload(recipe: "Recipe") -> Workload | str:
    """The recipe's rows where everything needed for them lies here, else the reason why they were not read."""
    if not Path(recipe.model.name).is_dir():
        return "the tokenizer is not in a local folder"
    from peftchat.conversations.readers import find_files

    try:
        files = [find_files(entry.path, entry.split) for entry in recipe.data.train]
        if any(found is None for found in files):
            return "the data is on a hub"
        if sum(file.stat().st_size for found in files for file in found or ()) > _READ_AT_MOST:
            return "the data is large"
        return _read(recipe)
    except UserError as error:
        return str(error)


def _read(recipe: "Recipe") -> Workload:
    from peftchat.dataset.cache import load_splits
    from peftchat.training.model import chat_format

    chat = chat_format(recipe)
    return workload_of(recipe, chat, load_splits(recipe, chat)["train"])


def workload_of(recipe: "Recipe", chat: "ChatFormat", rows: "EncodedSplit") -> Workload:
    """What the recipe makes of encoded rows.

    Args:
        chat: the tokenizer in the recipe's chat format.
        rows: those to train on, at least one.
    """
    import numpy as np

    lengths = np.asarray(rows.store.lengths)
    sequences = _sequences(recipe, lengths)
    return Workload(
        sequences=len(sequences),
        tokens=int(lengths.sum()),
        longest=int(sequences.max()),
        dialogue=math.ceil(float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())),
        supervised=rows.stats.supervised / rows.stats.tokens,
        new_tokens=len(chat.new_tokens),
    )


def _sequences(recipe: "Recipe", lengths: "np.ndarray") -> "np.ndarray":
    """Tokens of each row or pack."""
    import numpy as np

    from peftchat.dataset.packing import pack

    if not recipe.data.packing:
        return lengths
    packs = pack(lengths, recipe.data.max_length, recipe.training.seed)
    return np.array([lengths[group].sum() for group in packs])


def steps_of(recipe: "Recipe", workload: Workload | None, settings: "PlanSettings") -> int | None:
    """Optimizer steps of the run; None where neither the recipe nor the data tells."""
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    if workload is None:
        return None
    return math.ceil(steps_an_epoch(workload, settings) * training.num_train_epochs)


def steps_an_epoch(workload: Workload, settings: "PlanSettings") -> int:
    """Optimizer steps in which every row or pack is seen once, as the trainer will count them."""
    passes = math.ceil(workload.sequences / (settings.batch * settings.processes))
    return max(1, math.ceil(passes / settings.accumulation))
