"""What a handful of seeds says about a mean."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from peftchat.comparing.candidates import Candidate, Settings
from peftchat.comparing.compare_plan import TrainingJob
from peftchat.comparing.hyperparameter_search import RATE
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for a two-sided 95 % interval, for 1 to 30 degrees of freedom."""

_NORMAL95 = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the 95 % interval around it.

    Attributes:
        margin: half the interval; None where one value is all there is.
        count: values it was made of.
    """

    mean: float
    margin: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95 % interval of independent values, at least one."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    return Estimate(mean, _quantile(count - 1) * stdev(values) / math.sqrt(count), count)


def _quantile(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval.

    Beyond the table it is the normal distribution's with the first two terms of its expansion in the inverse of the
    degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _NORMAL95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        job: what it was for.
        failure: why it failed, in one line; all that follows is then empty.
        loss: held-out loss at the end, in nats a supervised token.
        loss_before: the same before the first step.
        tokens, seconds: of training alone.
        weights_bytes: what it wrote to be used: an adapter, or whole weights.
        curve: step and held-out loss.
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

    @property
    def loss_by_tokens(self) -> Curve:
        """The curve over tokens; steps have nearly the same number of them, so each counts for its share."""
        return tuple((self.tokens * step / self.steps, loss) for step, loss in self.curve)

    @property
    def loss_by_seconds(self) -> Curve:
        """The curve over seconds of training, evaluation left out."""
        return tuple((self.seconds * step / self.steps, loss) for step, loss in self.curve)


def read_run_result(job: TrainingJob, run: Path) -> RunResult:
    """The record of a finished run.

    Raises:
        UserError: the folder holds no finished run.
    """
    folder = RunFolder(run)
    summary = RunSummary.read(folder)
    loss = summary.eval_loss
    if loss is None or not math.isfinite(loss):
        return RunResult(job, failure=f"the held-out loss is {loss}")
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
        curve=tuple(_points(folder.metrics.read())),
    )


def _points(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), float(line["eval_loss"]))
        for line in lines
        if "eval_loss" in line and math.isfinite(line["eval_loss"])
    ]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a finished run afterwards, with libraries that do not know peftchat.

    Attributes:
        failure: why nothing could be measured.
        plain_loss: loss on plain text, in nats a token.
        merge: what the merge's proof said: `same`, `differs`, `does not fold`, or `nothing to fold`.
        merge_words: the proof's or the refusal's own words.
        answers: prompt, answer, whether it ended its turn.
    """

    failure: str | None = None
    plain_loss: float | None = None
    merge: str | None = None
    merge_words: str = ""
    answers: tuple[tuple[str, str, bool], ...] = ()


def read_evaluation(path: Path) -> Evaluation:
    """What `peftchat.comparing.evaluate` wrote."""
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    answers = tuple((one["prompt"], one["answer"], one["stopped"]) for one in content["answers"])
    return Evaluation(None, content["plain_loss"], content["merge"], content["merge_words"], answers)


@dataclass(frozen=True)
class CandidateResult:
    """What became of one candidate.

    Attributes:
        candidate: which.
        tried: a run of the first seed for each of the settings tried.
        repeats: runs of the other seeds at the best of them.
        measured: what was measured of the best run of the first seed.
    """

    candidate: Candidate
    tried: Sequence[RunResult] = ()
    repeats: Sequence[RunResult] = ()
    measured: Evaluation = field(default_factory=Evaluation)

    @property
    def best(self) -> RunResult | None:
        """The run of the first seed with the lowest held-out loss; None if all failed."""
        whole = [record for record in self.tried if record.failure is None]
        return min(whole, key=lambda record: record.loss, default=None)

    @property
    def settings(self) -> Settings:
        """The best of the settings tried; empty if all failed."""
        return self.best.job.settings if self.best else {}

    @property
    def runs(self) -> list[RunResult]:
        """The finished runs at the best settings, one a seed."""
        return [] if self.best is None else [self.best, *(one for one in self.repeats if one.failure is None)]

    @property
    def failures(self) -> list[RunResult]:
        """The runs that failed."""
        return [record for record in (*self.tried, *self.repeats) if record.failure is not None]

    @property
    def loss(self) -> Estimate | None:
        """Held-out loss over the seeds."""
        return estimate([record.loss for record in self.runs]) if self.runs else None

    @property
    def losses(self) -> Mapping[int, float]:
        """Held-out loss by seed."""
        return {record.job.seed: record.loss for record in self.runs}

    @property
    def seconds(self) -> float:
        """Mean training time of a run."""
        return fmean(record.seconds for record in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """Mean over the runs."""
        return fmean(record.tokens_per_second for record in self.runs)

    @property
    def peak_memory_bytes(self) -> int:
        """Of the run that took the most."""
        return max(record.peak_memory_bytes for record in self.runs)

    @property
    def seconds_per_token(self) -> float:
        """Training time a token of the fastest run: whatever else a machine does can only make one slower.

        The learning rate does not matter for it, so runs that tried another one count too.
        """
        alike = [one for one in self.tried if one.failure is None and _without_rate(one) == _without_rate(self.best)]
        return min(record.seconds / max(1, record.tokens) for record in [*self.runs, *alike])

    @property
    def cost(self) -> float:
        """What training takes of a machine for each token: time times memory."""
        return self.seconds_per_token * self.peak_memory_bytes

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` where the best learning rate is at an end of those tried."""
        rates = sorted(rate for one in self.tried if isinstance(rate := one.job.settings.get(RATE), float))
        if len(rates) < 2 or self.best is None:
            return None
        best = self.settings[RATE]
        return "lowest" if best == rates[0] else "highest" if best == rates[-1] else None


def _without_rate(record: RunResult | None) -> dict[str, Any]:
    return {} if record is None else {key: value for key, value in record.job.settings.items() if key != RATE}
