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
    """

    apply: ApplyDelta
    needs_all_rows: bool = False


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
    """A delta and the weight of its adapter (1: as trained)."""

    weight: float
    delta: Delta


def sum_deltas(parts: Sequence[WeightedDelta]) -> AddDelta:
    """Return one delta for a parameter that one or several adapters change.

    Computed deltas add up: `W + sum(weight * (apply(W) - W))`, so a weight w multiplies the scaling of a LoRA by w.
    Replaced rows and weights have no meaningful difference to the base, which may not even have had the row. Those of
    one adapter are used as trained, whatever its weight. Those of several are averaged by weight.

    Raises:
        UserError: the weights of adapters that replace the same thing add up to 0 or less.
    """
    added = [(part.weight, part.delta) for part in parts if isinstance(part.delta, AddDelta)]
    rows = _mean_rows([(part.weight, part.delta) for part in parts if isinstance(part.delta, ReplaceRows)])
    replacement = _mean([(part.weight, part.delta.value) for part in parts if isinstance(part.delta, ReplaceWeight)])

    def apply(base: torch.Tensor, start: int) -> torch.Tensor:
        if replacement is not None:
            part = replacement[start : start + len(base)] if base.dim() else replacement
            base = part.to(torch.float32)
        if len(added) == 1 and added[0][0] == 1.0:
            base = added[0][1].apply(base, start)
        elif added:
            base = base + sum(weight * (delta.apply(base.clone(), start) - base) for weight, delta in added)
        for index, value in rows.items():
            if start <= index < start + len(base):
                base[index - start] = value
        return base

    return AddDelta(apply, needs_all_rows=any(delta.needs_all_rows for _, delta in added))


def _mean_rows(parts: list[tuple[float, ReplaceRows]]) -> dict[int, torch.Tensor]:
    found: dict[int, list[tuple[float, torch.Tensor]]] = {}
    for weight, rows in parts:
        for index, value in zip(rows.ids, rows.values, strict=True):
            found.setdefault(index, []).append((weight, value))
    means = {index: _mean(values) for index, values in found.items()}
    return {index: value for index, value in means.items() if value is not None}


def _mean(parts: list[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    if len(parts) <= 1:
        return parts[0][1] if parts else None
    total = sum(weight for weight, _ in parts)
    if total <= 0:
        raise UserError(f"the weights of the adapters add up to {total:g}, expected more than 0", where="--adapter")
    mean = torch.zeros_like(parts[0][1], dtype=torch.float32)
    for weight, value in parts:
        mean += value.to(torch.float32) * (weight / total)
    return mean
