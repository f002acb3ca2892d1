"""Deltas of parameters, and the sum of several adapters' deltas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peftchat.errors import UserError

Read = Callable[[str], torch.Tensor]
"""Parameter name -> all of the base's weights, float32."""

ApplyDelta = Callable[[torch.Tensor, int], torch.Tensor]
"""Old rows (float32, `[n, ...]`, may be overwritten) and the number of the first -> new rows, float32, same shape."""


@dataclass(frozen=True)
class AddDelta:
    """New weights are computed from the old ones.

    Attributes:
        apply: the computation.
        needs_all_rows: the computation needs all rows at once.
        only_replaces: no new weight depends on an old one.
    """

    apply: ApplyDelta
    needs_all_rows: bool = False
    only_replaces: bool = False


@dataclass(frozen=True)
class ReplaceRows:
    """Some rows are replaced: `values[i]` becomes row `ids[i]`."""

    ids: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class ReplaceWeight:
    """All of the parameter is replaced by a trained copy."""

    value: torch.Tensor


Delta = AddDelta | ReplaceRows | ReplaceWeight


@dataclass(frozen=True)
class WeightedDelta:
    """A delta, the weight of its adapter (1: as trained), and the adapter's place among those of the merge."""

    weight: float
    delta: Delta
    number: int = 0


CombineUpdates = Callable[[Sequence[tuple[int, float, torch.Tensor]]], torch.Tensor]
"""Number, weight and update (float64, of one shape) of each adapter -> their combination, float64, same shape."""


def sum_deltas(parts: Sequence[WeightedDelta], combine: CombineUpdates | None = None) -> AddDelta:
    """Return one delta for a parameter that one or several adapters change.

    Computed deltas add up: `W + sum(weight * (apply(W) - W))`, so a weight w multiplies the scaling of a LoRA by w.
    Replaced rows and weights have no meaningful difference to the base, which may not even have had the row. Those of
    one adapter are used as trained, whatever its weight. Those of several are averaged by weight.

    Args:
        parts: the deltas of each adapter.
        combine: takes the place of the weighted sum of computed deltas. It needs all rows at once.

    Raises:
        UserError: the weights of adapters that replace the same thing add up to 0 or less.
    """
    computed = [(part.number, part.weight, part.delta) for part in parts if isinstance(part.delta, AddDelta)]
    added = [(weight, delta) for _, weight, delta in computed]
    rows = mean_rows([(part.weight, part.delta) for part in parts if isinstance(part.delta, ReplaceRows)])
    replacement = weighted_mean(
        [(part.weight, part.delta.value) for part in parts if isinstance(part.delta, ReplaceWeight)]
    )

    def apply(base: torch.Tensor, start: int) -> torch.Tensor:
        if replacement is not None:
            part = replacement[start : start + len(base)] if base.dim() else replacement
            base = part.to(torch.float32, copy=True)
        if combine is not None and computed:
            old = base.double()
            updates = [(number, weight, delta.apply(base.clone(), start) - old) for number, weight, delta in computed]
            base = (old + combine(updates)).to(torch.float32)
        elif len(added) == 1 and added[0][0] == 1.0:
            base = added[0][1].apply(base, start)
        elif added:
            base = base + sum(weight * (delta.apply(base.clone(), start) - base) for weight, delta in added)
        for index, value in rows.items():
            if start <= index < start + len(base):
                base[index - start] = value
        return base

    whole = bool(added) and (combine is not None or any(delta.needs_all_rows for _, delta in added))
    return AddDelta(apply, needs_all_rows=whole, only_replaces=not computed)


def mean_rows(parts: Sequence[tuple[float, ReplaceRows]]) -> dict[int, torch.Tensor]:
    """Return the mean of replaced rows by weight, by the number of the row.

    Raises:
        UserError: the weights of adapters that replace the same row add up to 0 or less.
    """
    found: dict[int, list[tuple[float, torch.Tensor]]] = {}
    for weight, rows in parts:
        for index, value in zip(rows.ids, rows.values, strict=True):
            found.setdefault(index, []).append((weight, value))
    means = {index: weighted_mean(values) for index, values in found.items()}
    return {index: value for index, value in means.items() if value is not None}


def weighted_mean(parts: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    """Return the mean of tensors by weight; a single one as it is, None of none.

    Raises:
        UserError: the weights add up to 0 or less.
    """
    if len(parts) <= 1:
        return parts[0][1] if parts else None
    total = sum(weight for weight, _ in parts)
    if total <= 0:
        what = "the weights of adapters that trained the same token or module add up to"
        hint = "Such a module is the mean of the trained ones, by weight."
        raise UserError(f"{what} {total:g}, expected more than 0", where="--weights", hint=hint)
    mean = torch.zeros_like(parts[0][1], dtype=torch.float32)
    for weight, value in parts:
        mean += value.to(torch.float32) * (weight / total)
    return mean
