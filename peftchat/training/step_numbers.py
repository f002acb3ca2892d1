"""Step numbers: loss and gradient norm of every optimizer step, checked to be finite.

Nothing waits for the device. The values of a GPU's step are copied to the host while the next step runs, and are read
one step later, or before anything is logged, evaluated or saved. A CPU's are read before its optimizer steps.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from peftchat.training.outliers import StepConversations
from peftchat.training.spikes import Spike, SpikeDetector, example_losses, worst_first

_MAX_SKIPPED = 30
"""Consecutive steps that float16's loss scaling may skip: each halves the scale, which begins at 2^16."""

_MAX_STILL = 20
"""Consecutive steps without a gradient after which a run stops. A model whose activations overflowed has none."""

_LEARNED_LOSS = 0.01
"""A loss below this may round to one without a gradient."""

_SOURCES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class BadStep:
    """An optimizer step whose loss or gradient norm is not finite.

    Attributes:
        step: its number, from 1 on.
        what: the value, in words.
        examples: indices of the examples in this process's part of it; those with a loss that is not finite, if any.
    """

    step: int
    what: str
    examples: tuple[int, ...]


@dataclass
class StepCounts:
    """What the steps of this process's part of a run had in common.

    Attributes:
        steps: optimizer steps.
        without_gradient: those with a gradient norm of exactly 0, although there was something to learn.
        still: the last of them in a row.
        rate_sum: sum of their learning rates.
        losses: their losses, over all processes.
    """

    steps: int = 0
    without_gradient: int = 0
    still: int = 0
    rate_sum: float = 0.0
    losses: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Pending:
    """A step whose values are on their way to the host.

    They are the number of failing processes, the loss of all processes, the gradient norm, the loss of each micro-batch
    of this process, and that of each target of it.
    """

    step: int
    examples: list[Sequence[int]]
    counts: list[Sequence[int]]
    values: Tensor
    event: Any = None

    def read(self) -> npt.NDArray[np.float64]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.numpy().astype(np.float64)


@dataclass
class StepMonitor:
    """Collects the numbers of each step.

    Attributes:
        device: where they are computed.
        may_skip: whether float16's loss scaling skips steps whose gradient overflows.
        sum_over_processes: sums a tensor over all processes; None for a single process.
        processes: their number; each one's loss is scaled by it.
        counts: of the steps that were read.
        waits: whether a step's values are read before its update, on a GPU too.
        spikes: of the steps that were read, until they are taken.
        conversations: losses of this process's part of the steps that were read, until they are taken.
    """

    device: torch.device
    may_skip: bool = False
    sum_over_processes: Callable[[Tensor], Tensor] | None = None
    processes: int = 1
    counts: StepCounts = field(default_factory=StepCounts)
    waits: bool = False
    spikes: list[Spike] = field(default_factory=list)
    conversations: list[StepConversations] = field(default_factory=list)
    _detector: SpikeDetector = field(default_factory=SpikeDetector)
    _target_losses: list[Tensor] = field(default_factory=list)
    _target_counts: list[Sequence[int]] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)
    _examples: list[Sequence[int]] = field(default_factory=list)
    _pending: list[_Pending] = field(default_factory=list)
    _skipped: int = 0

    def add(
        self, loss: Tensor, examples: Sequence[int], losses: Tensor | None = None, counts: Sequence[int] = ()
    ) -> None:
        """Add a micro-batch to the current step.

        Args:
            loss: shape (), detached.
            examples: indices of its examples.
            losses: of each target in nats, detached, shape (N,).
            counts: targets of each example; they sum to N.
        """
        if losses is not None:
            self._target_losses.append(losses.float())
            self._target_counts.append(counts)
        self._losses.append(loss.float())
        self._examples.append(examples)

    def end_step(self, step: int, grad_norm: Tensor | float | None, rate: float = 0.0) -> BadStep | None:
        """End the current step; every process must call it.

        Args:
            step: its number, from 1 on.
            grad_norm: of all processes together; None if it was not computed.
            rate: the learning rate.

        Returns:
            The first step that was read and is bad: this one on a CPU, the one before on a GPU.
        """
        norm = torch.as_tensor(1.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=self.device)
        losses = torch.stack([*self._losses]) if self._losses else torch.zeros(1, device=self.device)
        shared = torch.stack([(~torch.isfinite(losses)).any().float(), losses.sum() / self.processes])
        if self.sum_over_processes is not None:
            # All processes have to stop at the same step; gradients are shared already, losses are not.
            shared = self.sum_over_processes(shared)
        values = torch.cat([shared, norm.reshape(1), losses, *self._target_losses])
        pending = _Pending(step, self._examples, self._target_counts, values)
        self._losses, self._examples, self._target_losses, self._target_counts = [], [], [], []
        self.counts.rate_sum += rate
        if self.device.type == "cuda":
            pending.values, pending.event = _copy_to_host(pending.values)
        self._pending.append(pending)
        return self.check(keep=1 if self.device.type == "cuda" and not self.waits else 0)

    def check(self, *, keep: int = 0) -> BadStep | None:
        """Read all steps but the last `keep` ones, and return the first bad one."""
        while len(self._pending) > keep:
            bad = self._read(self._pending.pop(0))
            if bad is not None:
                return bad
        return None

    def _read(self, pending: _Pending) -> BadStep | None:
        values = pending.read()
        failing, loss, norm = (float(value) for value in values[:3])
        losses, targets = values[3 : 3 + len(pending.examples)], values[3 + len(pending.examples) :]
        if failing:
            value = next((float(loss) for loss in losses if not math.isfinite(loss)), math.nan)
            return BadStep(pending.step, f"the loss is {value}", _failing_examples(pending, losses, targets))
        if not math.isfinite(norm):
            self._skipped += 1
            if self.may_skip and self._skipped < _MAX_SKIPPED:
                return None
            what = f"the gradient norm is {norm}"
            if self.may_skip:
                what += f" for {self._skipped} steps in a row, so that float16's loss scaling skipped them all"
            return BadStep(pending.step, what, _indices(pending.examples))
        self._skipped = 0
        counts = self.counts
        counts.steps += 1
        counts.losses.append(loss)
        examples = _indices(pending.examples)
        if pending.counts:
            self.conversations.append(StepConversations.of(pending.step, examples, _indices(pending.counts), targets))
        spike = self._detector.judge(pending.step, loss)
        if spike is not None:
            self.spikes.append(_with_examples(spike, pending, targets))
        is_still = norm == 0.0 and loss > _LEARNED_LOSS
        counts.without_gradient += is_still
        counts.still = counts.still + 1 if is_still else 0
        if counts.still == _MAX_STILL:
            what = f"the gradient norm is 0 for {_MAX_STILL} steps in a row"
            return BadStep(pending.step, what, _indices(pending.examples))
        return None


def _failing_examples(
    pending: _Pending, losses: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> tuple[int, ...]:
    """Return the examples with a loss that is not finite, or those of the micro-batches that have one."""
    examples = _indices(pending.examples)
    if pending.counts:
        counts = _indices(pending.counts)
        owners = np.repeat(np.arange(len(counts)), counts)
        found = np.unique(owners[~np.isfinite(targets)])
        # A penalty may fail alone; then no example does.
        if len(found):
            return tuple(examples[place] for place in found)
    bad = ~np.isfinite(losses)
    return _indices([part for part, is_bad in zip(pending.examples, bad, strict=False) if is_bad])


def _with_examples(spike: Spike, pending: _Pending, targets: npt.NDArray[np.float64]) -> Spike:
    """Return a spike with this process's examples, by their losses where these are known."""
    examples = _indices(pending.examples)
    if not pending.counts:
        return replace(spike, examples=examples, losses=(spike.loss,) * len(examples))
    worst = worst_first(spike, examples, example_losses(targets, _indices(pending.counts)))
    return replace(spike, examples=tuple(one for one, _ in worst), losses=tuple(loss for _, loss in worst))


def _copy_to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Start copying values to the host; return the copy, and the event after which it is there."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _indices(parts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(int(index) for part in parts for index in np.asarray(part).ravel())


def first_not_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Return the name of the first trained parameter with a value that is not finite, in this process's part of them.

    Args:
        parameters: names and parameters, which ZeRO-3 may have partitioned.
    """
    trained = [(name, getattr(weight, "ds_tensor", weight.data)) for name, weight in parameters if weight.requires_grad]
    trained = [(name, values) for name, values in trained if values.is_floating_point() and values.numel()]
    if not trained:
        return None
    # The sum of a finite part may overflow, so each value is looked at; the host waits once for all of them.
    finite = torch.stack([torch.isfinite(values).all() for _, values in trained]).tolist()
    return next((name for (name, _), good in zip(trained, finite, strict=True) if not good), None)


def name_sources(sources: Sequence[str]) -> str:
    """Name a few conversations by `file:line`, and count them."""
    sources = list(dict.fromkeys(sources))
    if not sources:
        return "no conversation"
    shown = ", ".join(sources[:_SOURCES_SHOWN])
    more = len(sources) - _SOURCES_SHOWN
    count = f"{len(sources)} conversation{'s' if len(sources) > 1 else ''}"
    return f"{count}: {shown}{f' and {more} more' if more > 0 else ''}"


@dataclass(frozen=True, slots=True)
class LossTrend:
    """Where the loss of a run began and where it ended.

    Attributes:
        start: loss of the first step.
        first: median of the first third of the steps.
        last: median of the last third.
        noise: how far two such medians may differ by chance.
    """

    start: float
    first: float
    last: float
    noise: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> "LossTrend | None":
        """Return the trend of losses in order; None for fewer than three.

        The noise is twice that of a median of so many values, by the median difference of neighbors, and at least a
        twentieth of the beginning.
        """
        third = len(losses) // 3
        if not third:
            return None
        first, last = float(np.median(losses[:third])), float(np.median(losses[-third:]))
        spread = 1.05 * float(np.median(np.abs(np.diff(losses)))) / math.sqrt(third)
        return cls(losses[0], first, last, max(0.05 * abs(first), 2.0 * spread))

    @property
    def rose(self) -> bool:
        """Whether the loss ended higher, by more than its noise."""
        return self.last > self.first + self.noise

    def diverged(self, vocabulary: int) -> bool:
        """Whether the loss more than doubled, to more than twice that of a guess among all tokens."""
        return self.last > 2.0 * max(min(self.start, self.first), math.log(vocabulary))
