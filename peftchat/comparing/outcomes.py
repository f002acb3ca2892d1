"""Results of a comparison: of a run, an evaluation and a candidate."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from peftchat.comparing.candidates import Candidate, Settings
from peftchat.comparing.compare_plan import TrainingJob
from peftchat.comparing.hyperparameter_search import LEARNING_RATE
from peftchat.comparing.measure import CaseScore
from peftchat.comparing.task_scores import TaskScore
from peftchat.files import write_text
from peftchat.runs.eval_labels import read_eval_answers
from peftchat.runs.eval_losses import ConversationLoss, read_eval_losses
from peftchat.runs.eval_pairs import PairResult, read_eval_pairs
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary, SampleAnswer
from peftchat.student import t_quantile


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its 95 % interval.

    Attributes:
        mean: the mean.
        margin: half the interval; None for a single seed.
        seeds: the number of seeds.
    """

    mean: float
    margin: float | None
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and Student's 95 % interval of at least one independent value."""
    mean, seeds = fmean(values), len(values)
    if seeds < 2:
        return Estimate(mean, None, seeds)
    return Estimate(mean, t_quantile(seeds - 1) * stdev(values) / math.sqrt(seeds), seeds)


Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class RunResult:
    """The result of a run that has ended.

    Attributes:
        job: the training job.
        failure: why it failed, in one line; the other values are then empty.
        loss: held-out loss at the end, in nats per supervised token; of pairs, the mean of the objective's own.
        loss_before: held-out loss before the first step.
        steps, tokens, seconds: of training, without evaluation.
        weights_bytes: size of the files it wrote: the adapter, or all weights.
        curve: pairs of step and held-out loss.
        own_curve: pairs of step and the share that is right by the objective's own reward, for an objective with pairs.
        held_out: the losses by conversation; empty where an older version kept none.
        pairs: the held-out pairs of an objective with pairs.
        scores: of held-out pairs or labeled answers; those of pairs follow from all runs (`pair_scores.with_scores`).
        own_right: the share that is right by the objective's own reward.
    """

    job: TrainingJob
    failure: str | None = None
    loss: float = math.nan
    loss_before: float | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    trainable_parameters: int = 0
    weights_bytes: int = 0
    curve: Curve = ()
    own_curve: Curve = ()
    held_out: Sequence[ConversationLoss] = ()
    pairs: Sequence[PairResult] = ()
    scores: Sequence[CaseScore] = ()
    own_right: float | None = None

    @property
    def right(self) -> float | None:
        """The share of held-out pairs or labeled answers that are right; None where there are none."""
        return fmean(one.right for one in self.scores) if self.scores else None

    @property
    def margin(self) -> float | None:
        """The mean margin of the held-out pairs in nats; None where it is not known."""
        known = [one.margin for one in self.scores if one.margin is not None]
        return fmean(known) if known and len(known) == len(self.scores) else None

    def by_tokens(self, curve: Curve) -> Curve:
        """Return pairs of tokens and value for those of step and value, if all steps have as many tokens."""
        return tuple((self.tokens * step / self.steps, value) for step, value in curve)

    def by_seconds(self, curve: Curve) -> Curve:
        """Return pairs of training seconds and value for those of step and value, if all steps take as long."""
        return tuple((self.seconds * step / self.steps, value) for step, value in curve)


def read_run_result(job: TrainingJob, run: Path) -> RunResult:
    """Read the result of a finished run from its folder.

    Raises:
        UserError: the folder holds no finished run.
    """
    folder = RunFolder(run)
    summary = RunSummary.read(folder)
    loss = summary.eval_loss
    if loss is None or not math.isfinite(loss):
        return RunResult(job, failure=f"the held-out loss is {loss}")
    lines = folder.metrics.read()
    summaries = (summary.eval_pairs, summary.eval_labels)
    return RunResult(
        job,
        loss=loss,
        loss_before=summary.eval_loss_before,
        steps=summary.steps or 0,
        tokens=summary.tokens or 0,
        seconds=summary.seconds or 0.0,
        tokens_per_second=summary.tokens_per_second or 0.0,
        peak_memory_bytes=summary.peak_memory_bytes or 0,
        trainable_parameters=summary.trainable_parameters or 0,
        weights_bytes=folder.weights_bytes() or 0,
        curve=_curve_points(lines, "eval_loss"),
        own_curve=_curve_points(lines, "eval_accuracy"),
        held_out=read_eval_losses(folder.eval_losses),
        pairs=read_eval_pairs(folder.eval_pairs),
        scores=[CaseScore(one.source, one.right) for one in read_eval_answers(folder.eval_answers)],
        own_right=next((one.right for one in summaries if one is not None), None),
    )


def _curve_points(lines: list[dict[str, Any]], name: str) -> Curve:
    return tuple((float(line["step"]), float(line[name])) for line in lines if math.isfinite(line.get(name, math.nan)))


MergeResult = Literal["same", "differs", "not mergeable", "full model"]
"""Whether the merged model computes what base and adapter compute, or why there is no merged model."""


class Evaluation(BaseModel):
    """The evaluation of a finished run, loaded by stock transformers and PEFT.

    Attributes:
        error: why it could not be evaluated.
        general_loss: loss on text unrelated to the training data, in nats per token.
        general_parts: the same by parts of the text: the summed loss and the number of tokens of each.
        merge: the result of merging; None if it was not tried.
        merge_message: the message of the merge's verification, or of its error.
        answers: answers to the prompts.
    """

    model_config = ConfigDict(frozen=True)

    error: str | None = None
    general_loss: float | None = None
    general_parts: tuple[tuple[float, int], ...] = ()
    merge: MergeResult | None = None
    merge_message: str = ""
    answers: tuple[SampleAnswer, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an evaluation that its child process wrote."""
        return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the evaluation as JSON."""
        text = json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"
        # Answers may hold lone surrogates, which UTF-8 cannot encode; backslash escapes are valid JSON.
        write_text(path, text, errors="backslashreplace")


@dataclass(frozen=True)
class CandidateResult:
    """The results of one candidate.

    Attributes:
        candidate: the candidate.
        trials: one run per settings tried, on the first seed; short runs of a search are among them.
        seed_runs: runs with the best settings on the other seeds.
        evaluation: the evaluation of the best trial.
        task_scores: for each of `runs`, the scores on all tasks; empty where none are asked.
        task_error: why a run could not be asked.
    """

    candidate: Candidate
    trials: Sequence[RunResult] = ()
    seed_runs: Sequence[RunResult] = ()
    evaluation: Evaluation = field(default_factory=Evaluation)
    task_scores: Sequence[Sequence[TaskScore]] = ()
    task_error: str | None = None

    @property
    def best(self) -> RunResult | None:
        """The trial of full length with the lowest held-out loss; None if all failed."""
        finished = [run for run in self.trials if run.failure is None and run.job.share == 1]
        return min(finished, key=lambda run: run.loss, default=None)

    @property
    def settings(self) -> Settings:
        """The settings of the best trial; empty if all failed."""
        return self.best.job.settings if self.best else {}

    @property
    def runs(self) -> list[RunResult]:
        """The finished runs with the best settings, one per seed."""
        return [] if self.best is None else [self.best, *(run for run in self.seed_runs if run.failure is None)]

    @property
    def failures(self) -> list[RunResult]:
        """The runs that failed."""
        return [run for run in (*self.trials, *self.seed_runs) if run.failure is not None]

    @property
    def loss(self) -> Estimate | None:
        """Held-out loss over the seeds."""
        return estimate([run.loss for run in self.runs]) if self.runs else None

    @property
    def right(self) -> Estimate | None:
        """The share of held-out pairs or labeled answers that are right, over the seeds."""
        known = [run.right for run in self.runs if run.right is not None]
        return estimate(known) if known and len(known) == len(self.runs) else None

    @property
    def margin(self) -> float | None:
        """The mean margin of the held-out pairs over the seeds, in nats."""
        known = [run.margin for run in self.runs if run.margin is not None]
        return fmean(known) if known and len(known) == len(self.runs) else None

    @property
    def own_right(self) -> float | None:
        """The share that is right by the objective's own reward, over the seeds."""
        known = [run.own_right for run in self.runs if run.own_right is not None]
        return fmean(known) if known and len(known) == len(self.runs) else None

    @property
    def losses(self) -> Mapping[int, float]:
        """Held-out loss by seed."""
        return {run.job.seed: run.loss for run in self.runs}

    @property
    def seconds(self) -> float:
        """Mean training time of a run."""
        return fmean(run.seconds for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """Mean training throughput of the runs."""
        return fmean(run.tokens_per_second for run in self.runs)

    @property
    def peak_memory_bytes(self) -> int:
        """The largest peak memory of a run."""
        return max(run.peak_memory_bytes for run in self.runs)

    @property
    def seconds_per_token(self) -> float:
        """Training time per token of the fastest run.

        Other load on the machine can only slow a run down. Trials that differ only in the learning rate count too,
        since it does not affect speed.
        """
        alike = [run for run in self.trials if run.failure is None and _without_lr(run) == _without_lr(self.best)]
        return min(run.seconds / max(1, run.tokens) for run in [*self.runs, *alike])

    @property
    def cost(self) -> float:
        """The cost of training per token: time times memory."""
        return self.seconds_per_token * self.peak_memory_bytes

    @property
    def lr_at_grid_end(self) -> Literal["lowest", "highest"] | None:
        """Which end of the learning rates tried the best one is at, if any.

        A rate whose run failed was tried, so that a best rate next to it is at no end.
        """
        tried = {rate for run in self.trials if isinstance(rate := run.job.settings.get(LEARNING_RATE), float)}
        rates = sorted(tried)
        if len(rates) < 2 or self.best is None:
            return None
        best = self.settings[LEARNING_RATE]
        return "lowest" if best == rates[0] else "highest" if best == rates[-1] else None


def _without_lr(run: RunResult | None) -> dict[str, Any]:
    return {} if run is None else {key: value for key, value in run.job.settings.items() if key != LEARNING_RATE}
