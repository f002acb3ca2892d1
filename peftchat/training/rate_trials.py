"""Rate trials: short runs at several learning rates, what they advise, and how sure the advice is."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftchat.errors import VerificationError
from peftchat.files import write_text
from peftchat.formatting import format_count, format_decimal, format_percent, format_rate
from peftchat.training.held_out import HeldOutCase
from peftchat.training.rate_rule import RuleRate

GRID_STEP = 10 ** (1 / 3)
"""Ratio of neighboring rates: seven of them span a factor of 100."""

_ERRORS = 2.0
"""Standard errors within which two rates cannot be told apart."""

_LAST_SHARE = 3
"""The training loss that is shown is the mean of the last third of the steps."""


@dataclass(frozen=True, slots=True)
class RateTrial:
    """A short run at one rate.

    Attributes:
        rate: the peak rate.
        train_losses: of its steps, in nats per token, pair or answer.
        held_out: the loss of each held-out case after it; empty if the run failed.
        problem: why it failed.
    """

    rate: float
    train_losses: tuple[float, ...]
    held_out: tuple[HeldOutCase, ...]
    problem: str | None = None

    @property
    def loss(self) -> float | None:
        """The held-out loss in nats per token, pair or answer; None if the run failed."""
        weight = sum(one.weight for one in self.held_out)
        return sum(one.loss for one in self.held_out) / weight if weight else None

    @property
    def right(self) -> float | None:
        """The share of held-out pairs or answers that are right; None for conversations, or if the run failed."""
        known = [one.right for one in self.held_out if one.right is not None]
        return sum(known) / len(known) if known else None

    @property
    def train_loss(self) -> float | None:
        """The mean training loss of the last third of the steps; None if the run failed."""
        if self.problem is not None or not self.train_losses:
            return None
        return float(np.mean(self.train_losses[-math.ceil(len(self.train_losses) / _LAST_SHARE) :]))

    def __str__(self) -> str:
        if self.problem is not None:
            return f"learning rate {format_rate(self.rate)}: {self.problem}"
        right = "" if self.right is None else f", {format_percent(self.right)} right"
        return f"learning rate {format_rate(self.rate)}: held-out loss {format_decimal(self.loss)}{right}"


@dataclass(frozen=True, slots=True)
class Gap:
    """How much higher one held-out loss is than another, paired by case.

    Attributes:
        value: the difference, in nats per token, pair or answer.
        error: its standard error over cases.
    """

    value: float
    error: float

    @classmethod
    def between(cls, one: Sequence[HeldOutCase], other: Sequence[HeldOutCase]) -> "Gap":
        """Return by how much the loss of `one` is higher; both are of the same cases in order."""
        weights = np.array([case.weight for case in one], dtype=np.float64)
        difference = np.array([a.loss - b.loss for a, b in zip(one, other, strict=True)])
        value = float(difference.sum() / weights.sum())
        # The error of a ratio of sums: conversations differ in length.
        count = len(weights)
        rest = difference - value * weights
        error = math.sqrt(count / max(1, count - 1) * float((rest**2).sum())) / float(weights.sum())
        return cls(value, error)

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than what cases drawn by chance make of it."""
        return self.value > _ERRORS * self.error


@dataclass(frozen=True, slots=True)
class RateSearch:
    """What short runs at several rates say.

    Attributes:
        rule: the rate by the rule.
        trials: the runs, by rising rate.
        gaps: how much higher each held-out loss is than the lowest; None for a run that failed.
        advised: the rate to set.
        low, high: rates that were tried around it, and whose losses cannot be told from the lowest.
        at_edge: whether the lowest loss is at the end of what was tried.
        steps: optimizer steps of each run.
        run_steps: those of the recipe's own run.
        loss_before: held-out loss of the untrained model.
        seed: of all runs.
        cases: what is held out: `conversations`, `pairs` or `answers`.
    """

    rule: RuleRate
    trials: tuple[RateTrial, ...]
    gaps: tuple[Gap | None, ...]
    advised: float
    low: float
    high: float
    at_edge: bool
    steps: int
    run_steps: int
    loss_before: float
    seed: int
    cases: str = "conversations"

    @property
    def held_out(self) -> int:
        """The number of held-out cases."""
        return max(len(trial.held_out) for trial in self.trials)

    @property
    def has_shares(self) -> bool:
        """Whether each trial has a share of cases that are right."""
        return self.cases != "conversations"

    @property
    def setting(self) -> str:
        """The line to set in the recipe."""
        return f"training.learning_rate: {format_rate(self.advised)}"

    @property
    def certainty(self) -> str:
        """How sure the advice is, in one or two sentences."""
        count = f"{format_count(self.held_out)} held-out {self.cases}"
        if self.at_edge:
            return f"The lowest loss is at the end of what was tried, so a better rate may lie beyond ({count})."
        if self.low == self.high:
            return f"Its neighbors are worse by more than two standard errors ({count}, one seed)."
        return (
            f"From {format_rate(self.low)} to {format_rate(self.high)} the losses cannot be told apart "
            f"({count}, one seed): any of these rates will do."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything but single cases, for JSON."""
        return {
            "learning_rate": self.advised,
            "low": self.low,
            "high": self.high,
            "at_edge": self.at_edge,
            "certainty": self.certainty,
            "rule": {"learning_rate": self.rule.value, "reason": self.rule.reason},
            "steps": self.steps,
            "run_steps": self.run_steps,
            "seed": self.seed,
            f"held_out_{self.cases}": self.held_out,
            "eval_loss_before": self.loss_before,
            "trials": [
                {
                    "learning_rate": trial.rate,
                    "eval_loss": trial.loss,
                    **({} if trial.right is None else {"eval_accuracy": trial.right}),
                    "above_lowest": None if gap is None else gap.value,
                    "standard_error": None if gap is None else gap.error,
                    "train_loss": trial.train_loss,
                    "train_losses": list(trial.train_losses),
                    "problem": trial.problem,
                }
                for trial, gap in zip(self.trials, self.gaps, strict=True)
            ],
        }

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_text(path, json.dumps(self.as_dict(), indent=2) + "\n")


def judge(
    trials: Sequence[RateTrial], *, rule: RuleRate, steps: int, run_steps: int, loss_before: float, seed: int,
    cases: str = "conversations",
) -> RateSearch:  # fmt: skip
    """Return what trials by rising rate say.

    The advice is the lowest point of the parabola through the lowest loss and its neighbors, over the logarithm of the
    rate, and at most half a step of the grid away from the lowest.

    Raises:
        VerificationError: every run failed.
    """
    losses = [trial.loss for trial in trials]
    padded = [None, *losses, None]
    finite = [place for place, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    if not finite:
        raise VerificationError(f"no learning rate gave a finite loss; {trials[0]}")
    best = min(finite, key=lambda place: losses[place] or 0.0)
    gaps = [Gap.between(trial.held_out, trials[best].held_out) if trial.held_out else None for trial in trials]
    low, high = (_reach(gaps, best, step) for step in (-1, 1))
    offset = _vertex(*padded[best : best + 3])
    return RateSearch(
        rule, tuple(trials), tuple(gaps), float(f"{trials[best].rate * GRID_STEP**offset:.1e}"), trials[low].rate,
        trials[high].rate, best in (0, len(trials) - 1), steps, run_steps, loss_before, seed, cases,
    )  # fmt: skip


def _reach(gaps: Sequence[Gap | None], best: int, step: int) -> int:
    """Return the last place in a direction that cannot be told from the best."""
    place = best
    while 0 <= place + step < len(gaps):
        gap = gaps[place + step]
        if gap is None or gap.is_clear:
            break
        place += step
    return place


def _vertex(before: float | None, lowest: float | None, after: float | None) -> float:
    """Return where the parabola through three losses is lowest, in steps of the grid from the middle one."""
    if before is None or lowest is None or after is None:
        return 0.0
    bend = before - 2 * lowest + after
    return 0.0 if bend <= 0 else min(0.5, max(-0.5, (before - after) / (2 * bend)))
