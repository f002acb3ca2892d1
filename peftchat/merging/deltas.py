"""What can happen to a parameter, and how the changes of several adapters add up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peftchat.errors import UserError

Read = Callable[[str], torch.Tensor]
"""Parameter name -> the base's weights, whole, float32."""

ApplyDelta = Callable[[torch.Tensor, int], torch.Tensor]
"""Old rows (float32, `[n, ...]`, may be overwritten) and the number of the first -> new rows, float32, same shape."""


@dataclass(frozen=True)
class AddDelta:
    """New weights are computed from the old ones.

    Attributes:
        rows: the computation.
        whole: it needs all rows at once.
    """

    rows: ApplyDelta
    whole: bool = False


@dataclass(frozen=True)
class ReplaceRows:
    """Some rows are replaced: `values[i]` becomes row `ids[i]`."""

    ids: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class ReplaceWeight:
    """The parameter was trained whole."""

    value: torch.Tensor


Delta = AddDelta | ReplaceRows | ReplaceWeight


@dataclass(frozen=True)
class WeightedDelta:
    """A change and how much of it is wanted (1: as trained)."""

    weight: float
    change: Delta


def sum_deltas(parts: Sequence[WeightedDelta]) -> AddDelta:
    """One update out of the changes of one or several adapters.

    Updates add up: `W + sum(weight * (fold(W) - W))`, so that a LoRA of weight w is a LoRA with its scaling times w.
    What was replaced (token rows, modules trained whole) has no meaningful difference to a base that may not even have
    had the row: one adapter's is taken as trained whatever its weight, those of several are averaged by weight.

    Raises:
        UserError: the weights of adapters that replace the same thing do not add up to more than nothing.
    """
    updates = [(part.weight, part.change) for part in parts if isinstance(part.change, AddDelta)]
    rows = _mean_rows([(part.weight, part.change) for part in parts if isinstance(part.change, ReplaceRows)])
    whole = _mean([(part.weight, part.change.value) for part in parts if isinstance(part.change, ReplaceWeight)])

    def fold(base: torch.Tensor, start: int) -> torch.Tensor:
        if whole is not None:
            base = whole[start : start + len(base)].to(torch.float32) if base.dim() else whole.to(torch.float32)
        if len(updates) == 1 and updates[0][0] == 1.0:
            base = updates[0][1].rows(base, start)
        elif updates:
            base = base + sum(weight * (update.rows(base.clone(), start) - base) for weight, update in updates)
        for index, value in rows.items():
            if start <= index < start + len(base):
                base[index - start] = value
        return base

    return AddDelta(fold, whole=any(update.whole for _, update in updates))


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
        raise UserError("the weights of the adapters do not add up to more than 0", where="--adapter")
    mean = torch.zeros_like(parts[0][1], dtype=torch.float32)
    for weight, value in parts:
        mean += value.to(torch.float32) * (weight / total)
    return mean
