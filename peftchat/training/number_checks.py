"""Number checks: what a run does where a loss, a gradient or a weight is not finite, or where nothing moved."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftchat.errors import VerificationError
from peftchat.formatting import format_count, format_decimal
from peftchat.runs.run_summary import OutlierRecord, SpikeRecord
from peftchat.training.outliers import OutlierDetector, in_step_order
from peftchat.training.source_losses import SourceLosses
from peftchat.training.step_numbers import BadStep, LossTrend, StepCounts, StepMonitor, first_not_finite, name_sources

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore
    from peftchat.dataset.cache import Split
    from peftchat.runs.run_summary import AddedToken
    from peftchat.training.context import TrainContext


_SPIKES_TOLD = 10
"""Spikes that are told while a run goes on; `run.json` has the others."""

_OUTLIERS_TOLD = 10
"""Conversations with high losses that are told while a run goes on; `run.json` has the others."""

_SMALLEST_RATE = 1e-6
"""A sum of learning rates below this may round to nothing: Adam's steps are about as large as the rate."""


class NumberChecks:
    """Stops a run whose numbers are not finite, in all processes alike.

    Args:
        context: the run.
        device: where its numbers are computed.
        gather: returns the values of all processes; every process calls it.
        sum_over_processes: sums a tensor over all processes.

    Attributes:
        spikes: the loss spikes so far.
        outliers: the conversations so far whose loss is far above those of their length.
        by_source: training losses by file.
    """

    def __init__(
        self,
        context: "TrainContext",
        device: torch.device,
        gather: Callable[[Any], list[Any]],
        sum_over_processes: Callable[[Tensor], Tensor],
    ) -> None:
        self._context = context
        self._gather = gather
        self._on_spike = context.recipe.training.on_spike
        self.spikes: list[SpikeRecord] = []
        self.outliers: dict[str, OutlierRecord] = {}
        self.by_source = SourceLosses()
        self._outlier_detector = OutlierDetector()
        processes = context.distributed.world_size
        may_skip = context.recipe.model.computed_in == "float16"
        self._monitor = StepMonitor(
            device, may_skip, sum_over_processes if processes > 1 else None, processes, waits=self._on_spike == "skip"
        )

    @property
    def counts(self) -> StepCounts:
        """What the steps so far had in common."""
        return self._monitor.counts

    def add(
        self, loss: Tensor, examples: Sequence[int], losses: Tensor | None = None, counts: Sequence[int] = ()
    ) -> None:
        """Add a micro-batch to the current step (see `StepMonitor.add`)."""
        self._monitor.add(loss, examples, losses, counts)

    def end_step(self, step: int, grad_norm: Tensor | float | None, rate: float) -> bool:
        """End the current step (see `StepMonitor.end_step`).

        Returns:
            Whether its update is to be left out.

        Raises:
            VerificationError: the numbers of this or an earlier step are not finite, or a spike stops the run.
        """
        self._stop_at(self._monitor.end_step(step, grad_norm, rate))
        return self._report_spikes()

    def check_steps(self) -> None:
        """Check the steps that were not read yet; every process must call it.

        Raises:
            VerificationError: the numbers of one are not finite.
        """
        self._stop_at(self._monitor.check())
        self._report_spikes()
        self._judge_conversations()

    def _judge_conversations(self) -> None:
        """Judge the conversations of all processes since the last call; all processes come to the same result."""
        own, self._monitor.conversations = self._monitor.conversations, []
        store: ExampleStore = self._context.splits["train"].store
        steps = in_step_order(self._gather(own))
        for step in steps:
            self.by_source.add([store[int(index)].source for index in step.examples], step)
        for found in self._outlier_detector.judge(steps):
            source = store[found.example].source
            if source in self.outliers:
                continue
            self.outliers[source] = OutlierRecord(
                step=found.step, loss=found.loss, typical=found.level, limit=found.limit, tokens=found.tokens
            )
            if len(self.outliers) <= _OUTLIERS_TOLD:
                self._context.notes.tell(
                    f"Step {found.step}: the loss of {source} is {format_decimal(found.loss)} in "
                    f"{format_count(found.tokens)} tokens; {format_decimal(found.level)} is usual for this length."
                )

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Check the steps, and that every trained weight is finite; every process must call it.

        Raises:
            VerificationError: naming the first weight that is not.
        """
        self.check_steps()
        bad = self.weight_not_finite(model)
        if bad is not None:
            self._stop(f"after step {step} the weight {bad} is not finite")

    def tell_without_gradient(self, model: nn.Module) -> None:
        """Tell which trained weights have no gradient after the first step's backward passes."""
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        without = [name for name, parameter in trained if parameter.grad is None]
        if without:
            self._context.notes.tell(
                f"The first step gave no gradient to {len(without)} of {len(trained)} trained tensors, the first is "
                f"{without[0]}. The model does not use them for these conversations."
            )

    def weight_not_finite(self, model: nn.Module) -> str | None:
        """Return the name of the first trained weight that is not finite; every process must call it."""
        return next((name for name in self._gather(first_not_finite(model.named_parameters())) if name), None)

    def check_evaluation(self, loss: float, examples: Sequence[int], step: int) -> None:
        """Check a held-out loss; every process must call it.

        Args:
            loss: over all processes.
            examples: indices of this process's examples in batches with a loss that is not finite.
            step: the optimizer step after which it was computed.

        Raises:
            VerificationError: it is not finite.
        """
        if not math.isfinite(loss):
            sources = self._sources("eval", examples)
            self._stop(f"after step {step} the held-out loss is {loss}, in {sources}", is_trained=step > 0)

    def _stop_at(self, bad: BadStep | None) -> None:
        if bad is not None:
            self._stop(f"step {bad.step}: {bad.what}, in {self._sources('train', bad.examples)}")

    def _report_spikes(self) -> bool:
        """Tell the spikes that were read, or stop at one; return whether there was one whose update is left out."""
        found, self._monitor.spikes = self._monitor.spikes, []
        for spike in found:
            store: ExampleStore = self._context.splits["train"].store
            own = [(loss, store[index].source) for index, loss in zip(spike.examples, spike.losses, strict=True)]
            everyone = sorted((pair for part in self._gather(own) for pair in part), key=lambda pair: -pair[0])
            # A process whose examples are all below the limit names them all.
            above = [pair for pair in everyone if pair[0] > spike.limit] or everyone
            record = SpikeRecord(
                step=spike.step, loss=spike.loss, median=spike.median, limit=spike.limit,
                skipped=self._on_spike == "skip", conversations=_by_loss(above),
            )  # fmt: skip
            self.spikes.append(record)
            what = (
                f"step {spike.step}: the loss is {format_decimal(spike.loss)}, far above the median "
                f"{format_decimal(spike.median)} of the steps before, in {name_sources([one for _, one in above])}"
            )
            if self._on_spike == "stop":
                self._stop(what, cure="Look at them, or set training.on_spike: log or skip")
            if len(self.spikes) <= _SPIKES_TOLD:
                ending = ". Its update was left out." if record.skipped else "."
                self._context.notes.tell(f"{what[0].upper()}{what[1:]}{ending}")
        return bool(found) and self._on_spike == "skip"

    def _sources(self, split: "Split", examples: Sequence[int]) -> str:
        store: ExampleStore = self._context.splits[split].store
        named = [store[index].source for index in examples]
        return name_sources([source for part in self._gather(named) for source in part])

    def _stop(self, what: str, *, is_trained: bool = True, cure: str | None = None) -> None:
        training = self._context.recipe.training
        if cure is not None:
            pass
        elif is_trained:
            cure = f"Lower training.learning_rate ({format_decimal(training.peak_rate)})"
            if training.max_grad_norm == 0:
                cure += ", or clip the gradients with training.max_grad_norm: 1 (0 clips nothing)"
            if self._context.recipe.model.computed_in == "float16":
                cure += ", or set model.dtype: bfloat16"
        else:
            cure = "The base itself gives it: check its weights, model.dtype and these conversations"
        last = self._context.run_folder.latest_checkpoint()
        kept = f"The last good checkpoint is {last.path}" if last else "There is no checkpoint yet"
        raise VerificationError(f"{what}. {cure}. {kept}, and no model was saved.")


def _by_loss(pairs: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Return the highest loss of each source, highest first."""
    found: dict[str, float] = {}
    for loss, source in pairs:
        found.setdefault(source, loss)
    return found


def check_trend(losses: Sequence[float], vocabulary: int) -> None:
    """Check that the loss did not explode.

    Args:
        losses: of the run's steps.
        vocabulary: tokens of the model.

    Raises:
        VerificationError: it ended far above where it began and above that of a guess.
    """
    trend = LossTrend.of(losses)
    if trend is not None and trend.diverged(vocabulary):
        raise VerificationError(
            f"training diverged: the loss ended at {format_decimal(trend.last)} and began at "
            f"{format_decimal(trend.start)}; a guess among all tokens has {format_decimal(math.log(vocabulary))}. "
            "Lower training.learning_rate. No model was saved."
        )


def check_moved(counts: StepCounts, tokens: Sequence["AddedToken"], seen_before_target: Sequence[int]) -> None:
    """Check that training moved what it had to move.

    An added token is checked only if the steps were large enough to change a float32 number.

    Args:
        counts: of the run's steps.
        tokens: the added tokens.
        seen_before_target: how often each was seen where its input embedding gets a gradient.

    Raises:
        VerificationError: no step had a gradient, or an added token got one and did not move.
    """
    if counts.still > counts.steps // 3:
        since = "all" if counts.still == counts.steps else "the last"
        raise VerificationError(
            f"the gradient norm was 0 in {since} {counts.still} steps, although the loss was not, so nothing was "
            "trained there. Lower training.learning_rate, and check model.freeze_layers and the adapter's "
            "target_modules. No model was saved."
        )
    if counts.rate_sum < _SMALLEST_RATE or counts.steps == counts.without_gradient:
        return
    for token, before_target in zip(tokens, seen_before_target, strict=True):
        distances = {"input": token.input_moved, "output": token.output_moved}
        unmoved = [name for name, distance in distances.items() if distance == 0.0]
        if before_target and unmoved:
            raise VerificationError(
                f"the {unmoved[0]} embedding of {token.token} did not change, although the token occurs "
                f"{before_target} times before a target. No model was saved."
            )


def number_warnings(counts: StepCounts, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a run's numbers say against it, one sentence each.

    Args:
        counts: of its steps since it was started or resumed.
        lines: its logged steps.
    """
    warnings = []
    logged = [float(line["loss"]) for line in lines if line.get("loss") is not None]
    trend = LossTrend.of(max(counts.losses, logged, key=len))
    if trend is not None and trend.rose:
        ends = f"{format_decimal(trend.last)}, after {format_decimal(trend.first)}"
        warnings.append(f"The training loss ended above where it began: {ends}.")
    if counts.without_gradient:
        warnings.append(f"The gradient norm was 0 in {format_count(counts.without_gradient)} steps.")
    return warnings
