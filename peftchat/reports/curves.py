"""Curves of a run: points of its metrics against steps, tokens or time, and moving means."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np

from peftchat.runs.metrics_file import Scalar

Against = Literal["step", "tokens", "seconds"]

Points = list[tuple[float, float]]

_MIN_POINTS_FOR_MEAN = 40


def points(lines: Sequence[Mapping[str, Scalar]], key: str, against: Against = "step") -> Points:
    """Return the values of a metric; lines without it, or without a place on the axis, are left out."""
    places = _tokens(lines) if against == "tokens" else [line.get(against) for line in lines]
    return [
        (float(place), float(value))
        for place, value in zip(places, (line.get(key) for line in lines), strict=True)
        if isinstance(place, int | float) and isinstance(value, int | float)
    ]


def _tokens(lines: Sequence[Mapping[str, Scalar]]) -> list[float | None]:
    """Return the tokens trained up to each line; those of evaluations lie between those of training lines.

    Runs of older versions did not log tokens, and have no place.
    """
    counted = [(step, tokens) for step, tokens in points(lines, "tokens") if np.isfinite(tokens)]
    trained = sum("loss" in line for line in lines)
    if not counted or len(counted) < trained:
        return [None] * len(lines)
    steps = [0.0, *(step for step, _ in counted)]
    sums = [0.0, *accumulate(tokens for _, tokens in counted)]
    at = [line.get("step") for line in lines]
    return [float(np.interp(step, steps, sums)) if isinstance(step, int | float) else None for step in at]


def mean_window(curve: Sequence[tuple[float, float]]) -> int:
    """Return over how many points a curve is smoothed: a tenth of a long one, 1 for a short one."""
    return 1 if len(curve) < _MIN_POINTS_FOR_MEAN else len(curve) // 20 * 2 + 1


def smoothed(curve: Sequence[tuple[float, float]], window: int) -> Points:
    """Return the centered moving mean, over a shorter window near the ends."""
    half = window // 2
    values = [y for _, y in curve]
    means = []
    for place, (x, _) in enumerate(curve):
        near = values[max(0, place - half) : place + half + 1]
        means.append((x, sum(near) / len(near)))
    return means
