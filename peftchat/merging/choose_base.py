"""Which base a QLoRA adapter is folded into: the original weights, or those it was trained on.

While training, the base was `dequantise(quantise(W))`; the adapter has learned to live with the error of that. Folding
into W leaves the error out, folding into the dequantised weights keeps it. Both are measured against what was trained:
the relative distance, over a sample of the changed matrices, between the stored result and `dequantised base + update`
in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from peftchat.errors import UserError
from peftchat.merging.fold.change import Update
from peftchat.merging.weights import BaseWeights

BaseMode = Literal["auto", "original", "dequantized"]
BaseKind = Literal["original", "dequantized"]

_SAMPLE = 8


@dataclass(frozen=True)
class BaseChoice:
    """The base taken, and for a quantised run both distances to what was trained (0 is the same, 1 unrelated)."""

    taken: BaseKind
    distance_original: float | None = None
    distance_dequantized: float | None = None


def choose_base(
    mode: BaseMode,
    original: tuple[BaseWeights, Mapping[str, Update]],
    dequantized: tuple[BaseWeights, Mapping[str, Update]] | None,
    dtype: torch.dtype | None,
) -> BaseChoice:
    """Pick by `mode`; `auto` takes the nearer one, and the original where the run was not quantised.

    Args:
        mode: what the user asked for.
        original: the stored base and the updates on it.
        dequantized: the base as it was while training; None for a run on an unquantised base.
        dtype: type of the merged weights; None as stored.

    Raises:
        InputError: `dequantized` was asked for and the base was not quantised.
    """
    if dequantized is None:
        if mode == "dequantized":
            raise UserError("the run was not trained on a quantised base", where="--base", cure="Leave the flag out.")
        return BaseChoice("original")
    weights, updates = dequantized
    names = [name for name in updates if name in weights.round_tripped]
    names = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
    apart = {"original": 0.0, "dequantized": 0.0}
    size = 0.0
    for name in names:
        stored = dtype or weights.dtype(name)
        trained = _folded(weights, updates, name)
        size += float(trained.square().sum())
        apart["dequantized"] += float((trained.to(stored).to(torch.float32) - trained).square().sum())
        plain = _folded(*original, name).to(stored).to(torch.float32)
        apart["original"] += float((plain - trained).square().sum())
    weights.forget()
    distances = {kind: (square / size) ** 0.5 if size else 0.0 for kind, square in apart.items()}
    nearer: BaseKind = "original" if distances["original"] < distances["dequantized"] else "dequantized"
    return BaseChoice(nearer if mode == "auto" else mode, distances["original"], distances["dequantized"])


def _folded(weights: BaseWeights, updates: Mapping[str, Update], name: str) -> torch.Tensor:
    return updates[name].rows(weights.rows(name).to(torch.float32, copy=True), 0)
