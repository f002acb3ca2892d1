"""Loss spikes: steps whose loss is far above those before, and the conversations that they are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_WINDOW = 32
"""Steps that the median is taken over. It follows a run whose loss stays high after half of them."""

_FIRST = 16
"""Steps before the first judgment: the median deviation of fewer ones is too uncertain."""

_DEVIATIONS = 8.0
"""Standard deviations above the median, estimated as 1.4826 median deviations, that a spike has."""

_SHARE = 0.2
"""A spike is above the median by this share of it at least, so that a loss that hardly moves raises no alarm."""


@dataclass(frozen=True, slots=True)
class Spike:
    """A step with a loss far above those before.

    Attributes:
        step: its number, from 1 on.
        loss: its loss in nats per target.
        median: of the steps before.
        limit: what it exceeds.
        examples: indices of this process's examples of the step, highest loss first; only those above the limit if
            there are any.
        losses: their losses in nats per target.
    """

    step: int
    loss: float
    median: float
    limit: float
    examples: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()


@dataclass
class SpikeDetector:
    """Judges each step's loss by the median and the median deviation of the steps before, spikes included."""

    _window: list[float] = field(default_factory=list)

    def judge(self, step: int, loss: float) -> Spike | None:
        """Add a step's loss, finite and over all processes; return the spike that it is, if any."""
        before = self._window
        self._window = [*before[-_WINDOW + 1 :], loss]
        if len(before) < _FIRST:
            return None
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(np.array(before) - median)))
        limit = median + max(_DEVIATIONS * deviation, _SHARE * abs(median))
        return Spike(step, loss, median, limit) if loss > limit else None


def example_losses(losses: npt.NDArray[np.float64], counts: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the mean loss of each example; 0 for one without targets.

    Args:
        losses: of each target, in the order of the examples, shape (N,).
        counts: targets of each example; they sum to N.
    """
    owners = np.repeat(np.arange(len(counts)), counts)
    sums = np.bincount(owners, weights=losses, minlength=len(counts))
    return np.asarray(sums / np.maximum(counts, 1), dtype=np.float64)


def worst_first(spike: Spike, examples: Sequence[int], means: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    """Return the examples above a spike's limit, or all if none is, with their mean losses, highest first."""
    order = np.argsort(-means, kind="stable")
    pairs = [(int(examples[place]), float(means[place])) for place in order]
    return [pair for pair in pairs if pair[1] > spike.limit] or pairs
