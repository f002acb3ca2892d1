"""What one run gave: read from its folder, never remembered apart from it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.comparing.plan import Job
from peftchat.runs.metrics_file import MetricsFile
from peftchat.runs.run_summary import read_run_json, weights_size

if TYPE_CHECKING:
    from collections.abc import Mapping

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Record:
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

    job: Job
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


def read_record(job: Job, run: Path) -> Record:
    """The record of a finished run.

    Raises:
        InputError: the folder holds no finished run.
    """
    facts = read_run_json(run)
    loss = facts.get("eval_loss")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return Record(job, failure=f"the held-out loss is {loss}")
    lines = MetricsFile(run / "metrics.jsonl").read()
    return Record(
        job,
        loss=loss,
        loss_before=facts.get("eval_loss_before"),
        steps=facts["steps"],
        tokens=facts["tokens"],
        seconds=facts["seconds"],
        tokens_per_second=facts["tokens_per_second"] or 0.0,
        peak_memory_bytes=facts["peak_memory_bytes"],
        trainable_parameters=facts["trainable_parameters"],
        weights_bytes=weights_size(run) or 0,
        curve=tuple(_points(lines)),
    )


def _points(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), float(line["eval_loss"]))
        for line in lines
        if "eval_loss" in line and math.isfinite(line["eval_loss"])
    ]


@dataclass(frozen=True)
class Measured:
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


def read_measured(path: Path) -> Measured:
    """What `peftchat.comparing.measure` wrote."""
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    answers = tuple((one["prompt"], one["answer"], one["stopped"]) for one in content["answers"])
    return Measured(None, content["plain_loss"], content["merge"], content["merge_words"], answers)
