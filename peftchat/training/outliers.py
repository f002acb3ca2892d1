"""Outliers: conversations whose training loss is far above that of others of their length, also inside packs.

A step's loss hides one bad conversation among many. Here each conversation of a step is judged by its own mean loss
per token, against those around it in time (the loss falls while a model learns) and of similar length (the mean of few
tokens varies more). Every process judges the conversations of all processes, so all agree.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_WINDOW = 1024
"""Conversations that a new one is compared with. They are the last ones."""

_FIRST = 96
"""Conversations before the first judgment, which judges these too."""

_NEIGHBORS = 160
"""Conversations of the most similar lengths that give the level and the spread of a length."""

_RECENT = 64
"""Conversations whose median is the level of the moment."""

_SPREADS = 5.0
"""Spreads above the level of its length that an outlier has. A spread is the distance from the median to the 84th
percentile, one standard deviation of a normal distribution: losses are skewed to the high side."""

_SHARE = 0.5
"""An outlier is above the level by this share of it at least, so that losses of one value raise no alarm."""

_NATS = 0.5
"""The same in nats per token, for losses near zero."""

_SKIPPED_STEPS = 8
"""First steps of a run, which are not judged: added tokens and the format are learned there."""


@dataclass(frozen=True, slots=True)
class StepConversations:
    """The losses of the conversations of one step.

    Attributes:
        step: its number, from 1 on.
        examples: index of each example with a target, shape (N,).
        counts: its targets.
        sums: the sum of their losses in nats.
    """

    step: int
    examples: npt.NDArray[np.int64]
    counts: Floats
    sums: Floats

    @classmethod
    def of(cls, step: int, examples: Sequence[int], counts: Sequence[int], losses: Floats) -> Self:
        """Return the losses of a process's part of a step.

        Args:
            step: its number.
            examples: index of each example.
            counts: its targets; they sum to N.
            losses: of each target, in the order of the examples, shape (N,).
        """
        numbers = np.asarray(counts, dtype=np.int64)
        owners = np.repeat(np.arange(len(numbers)), numbers)
        sums: Floats = np.bincount(owners, weights=losses, minlength=len(numbers)).astype(np.float64)
        has_targets = numbers > 0
        indices = np.asarray(examples, dtype=np.int64)
        return cls(step, indices[has_targets], numbers[has_targets].astype(np.float64), sums[has_targets])


@dataclass(frozen=True, slots=True)
class Outlier:
    """A conversation with a loss far above those of its length.

    Attributes:
        step: the step that it was part of.
        example: its index.
        loss: its mean loss in nats per target.
        level: the median at that time for its length.
        limit: what it exceeds.
        tokens: its targets.
    """

    step: int
    example: int
    loss: float
    level: float
    limit: float
    tokens: int


@dataclass
class OutlierDetector:
    """Judges conversations in the order of their steps; the losses must be finite."""

    _steps: list[StepConversations] = field(default_factory=list)
    _lengths: Floats = field(default_factory=lambda: np.zeros(0))
    _means: Floats = field(default_factory=lambda: np.zeros(0))

    def judge(self, steps: Iterable[StepConversations]) -> list[Outlier]:
        """Add steps; return the outliers among those that can be judged by now."""
        self._steps += [step for step in steps if step.step > _SKIPPED_STEPS]
        waiting = sum(len(step.examples) for step in self._steps)
        if not waiting or len(self._means) + waiting < _FIRST:
            return []
        found: list[Outlier] = []
        numbers = np.concatenate([np.full(len(step.examples), step.step, dtype=np.int64) for step in self._steps])
        counts = np.concatenate([step.counts for step in self._steps])
        means = np.concatenate([step.sums for step in self._steps]) / counts
        examples = np.concatenate([step.examples for step in self._steps])
        self._steps = []
        before = len(self._means)
        all_lengths = np.concatenate([self._lengths, np.log2(counts)])
        all_means = np.concatenate([self._means, means])
        # Large parts are judged in pieces, so that each is compared with its own time.
        for start in range(0, waiting, _WINDOW // 4):
            stop = min(waiting, start + _WINDOW // 4)
            first = max(0, before + stop - _WINDOW)
            found += self._judged(
                all_lengths[first : before + stop], all_means[first : before + stop], stop - start,
                numbers[start:stop], examples[start:stop], counts[start:stop],
            )  # fmt: skip
        self._lengths, self._means = all_lengths[-_WINDOW:], all_means[-_WINDOW:]
        return found

    def _judged(
        self,
        lengths: Floats,
        means: Floats,
        new: int,
        steps: npt.NDArray[np.int64],
        examples: npt.NDArray[np.int64],
        counts: Floats,
    ) -> list[Outlier]:
        """Return the outliers among the last `new` of these conversations."""
        levels = _recent_median(means)
        order = np.argsort(lengths, kind="stable")
        ranked = (means / levels)[order]
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        size = min(_NEIGHBORS, len(order))
        starts = np.clip(places[-new:] - size // 2, 0, len(order) - size)
        neighbors = ranked[starts[:, None] + np.arange(size)]
        middle, high = np.quantile(neighbors, [0.5, 0.8413], axis=1)
        limits = (middle + np.maximum(_SPREADS * (high - middle), _SHARE * middle)) * levels[-new:]
        limits = np.maximum(limits, middle * levels[-new:] + _NATS)
        middle = middle * levels[-new:]
        own = means[-new:]
        return [
            Outlier(int(steps[n]), int(examples[n]), float(own[n]), float(middle[n]), float(limits[n]), int(counts[n]))
            for n in np.flatnonzero(own > limits)
        ]


def in_step_order(parts: Sequence[Sequence[StepConversations]]) -> list[StepConversations]:
    """Return the steps of all processes in order; those of one step in the order of the processes."""
    return sorted((step for part in parts for step in part), key=lambda step: step.step)


def _recent_median(means: Floats) -> Floats:
    """Return, for each conversation, the median of the `_RECENT` around and before it: the level of its time."""
    size = min(_RECENT, len(means))
    windows = np.median(np.lib.stride_tricks.sliding_window_view(means, size), axis=1)
    # Conversation n has the window that ends behind it, and the first ones have the first window.
    return np.concatenate([np.full(size - 1, windows[0]), windows])
