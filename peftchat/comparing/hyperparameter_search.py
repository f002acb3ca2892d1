"""Hyperparameter search on the first seed: learning rates, or optuna's TPE."""

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peftchat.comparing.candidates import Settings
from peftchat.errors import UserError

LEARNING_RATE = "training.learning_rate"


class Search(Protocol):
    """A search that proposes settings one by one and receives the loss of each."""

    @property
    def num_trials(self) -> int:
        """The number of settings it proposes."""

    @property
    def share(self) -> float:
        """The part of a run's full length that the settings returned last are to be trained for."""

    def ask(self) -> Settings | None:
        """Return the next settings to try; None after the last."""

    def tell(self, loss: float | None) -> None:
        """Record the held-out loss of the settings returned last; None if the run failed."""


class LearningRateGrid:
    """Learning rates in a fixed order.

    Args:
        learning_rates: at least one.
    """

    share = 1.0

    def __init__(self, learning_rates: Sequence[float]) -> None:
        self._remaining = list(learning_rates)
        self.num_trials = len(self._remaining)

    def ask(self) -> Settings | None:
        """Return the next learning rate."""
        return {LEARNING_RATE: self._remaining.pop(0)} if self._remaining else None

    def tell(self, loss: float | None) -> None:
        """Ignore the loss: a grid does not depend on it."""


SHORT_SHARE = 1 / 8
"""Length of a short run: seven of them and two full ones cost less than three full ones."""


class RateHalving:
    """Learning rates in two rounds: all of them in short runs, then the best and its better neighbor in full ones.

    It is successive halving (Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943) with runs that start over:
    a short run has the whole schedule, warm-up and decay included, as a run that is cut off at a high rate would be
    judged by the noise that the decay removes. Short runs favor rates that are somewhat too high or too low for long
    ones, so a neighbor always goes on with the best. If the best short run is at an end of the range, one more rate
    beyond it is tried first.

    Args:
        learning_rates: at least two, in rising order.
        share: the length of a short run as a part of a full one.
    """

    def __init__(self, learning_rates: Sequence[float], share: float = SHORT_SHARE) -> None:
        self.num_trials = len(learning_rates) + _FINALISTS
        self.share = share
        self._remaining = list(learning_rates)
        self._asked = 0.0
        self._losses: dict[float, float] = {}
        self._step = (learning_rates[-1] / learning_rates[0]) ** (1 / (len(learning_rates) - 1))
        self._can_widen = True

    def ask(self) -> Settings | None:
        """Return the next learning rate."""
        if not self._remaining and self.share < 1:
            self._end_round()
        if not self._remaining:
            return None
        self._asked = self._remaining.pop(0)
        return {LEARNING_RATE: self._asked}

    def tell(self, loss: float | None) -> None:
        """Record the loss of a short run."""
        if loss is not None and math.isfinite(loss) and self.share < 1:
            self._losses[self._asked] = loss

    def _end_round(self) -> None:
        """Widen the range, or go on to the full runs."""
        rates = sorted(self._losses)
        if not rates:
            return
        best = min(rates, key=self._losses.__getitem__)
        beyond = {rates[0]: best / self._step, rates[-1]: best * self._step}.get(best)
        if self._can_widen and beyond is not None:
            self._can_widen = False
            self.num_trials += 1
            self._remaining = [float(f"{beyond:.1e}")]
            return
        self.share = 1.0
        place = rates.index(best)
        near = rates[max(0, place - 1) : place] + rates[place + 1 : place + 2]
        self._remaining = [best, *sorted(near, key=self._losses.__getitem__)][:_FINALISTS]


_FINALISTS = 2
"""Rates that get a full run."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a key may take.

    Attributes:
        key: a recipe key.
        low, high: the smallest and the largest value.
        log: whether values are sampled on a logarithmic scale.
        integer: whether values are integers.
    """

    key: str
    low: float
    high: float
    log: bool
    integer: bool


def parse_range(flag: str) -> Range:
    """Parse `training.learning_rate=1e-5..1e-3:log` or `adapter.r=4..64`.

    Raises:
        UserError: the flag is malformed, or the range is empty.
    """
    key, equals, text = (part.strip() for part in flag.partition("="))
    bounds, _, scale = text.partition(":")
    low, dots, high = bounds.partition("..")
    where = f"--search {flag}"
    hint = "Write KEY=LOW..HIGH, or KEY=LOW..HIGH:log."
    if not (equals and key and dots) or scale not in ("", "log"):
        raise UserError("not a range", where=where, hint=hint)
    try:
        first, last = float(low), float(high)
    except ValueError:
        raise UserError(f"expected two numbers, got `{low}` and `{high}`", where=where, hint=hint) from None
    if not first < last:
        raise UserError(f"expected LOW < HIGH, got {low} and {high}", where=where, hint=hint)
    if scale == "log" and first <= 0:
        raise UserError(f"a logarithmic range must start above 0, got {low}", where=where, hint=hint)
    integer = all(end.strip().lstrip("-").isdecimal() for end in (low, high))
    return Range(key, first, last, scale == "log", integer)


def check_optuna() -> None:
    """Check that the optional library is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "a search over ranges needs optuna, which is not installed",
            where="--trials",
            hint="Install it with `pip install 'peftchat[sweep]'`.",
        )


class TPESearch:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., 2011).

    It is seeded and asked in order. An interrupted comparison therefore proposes the same settings again and finds
    their finished runs in its folder.

    Args:
        num_trials: how many settings to try.
        ranges: the ranges to search.
        fixed: settings that every trial shares.
        seed: of the sampler.
    """

    share = 1.0

    def __init__(self, num_trials: int, ranges: Sequence[Range], fixed: Settings, seed: int) -> None:
        import optuna

        logging.getLogger("optuna").setLevel(logging.ERROR)
        self.num_trials = num_trials
        self._remaining = num_trials
        self._ranges = ranges
        self._fixed = fixed
        # By default the first ten trials are random, which would be all trials of most comparisons.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(2, num_trials // 2)))
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._trial: Any = None

    def ask(self) -> Settings | None:
        """Return the next settings; real numbers have three digits."""
        if not self._remaining:
            return None
        self._remaining -= 1
        self._trial = self._study.ask()
        return {**self._fixed, **{searched.key: self._suggest(searched) for searched in self._ranges}}

    def tell(self, loss: float | None) -> None:
        """Update the estimator with the loss of a run."""
        import optuna

        if loss is None:
            self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._trial, loss)

    def _suggest(self, searched: Range) -> float | int:
        low, high = searched.low, searched.high
        if searched.integer:
            return int(self._trial.suggest_int(searched.key, int(low), int(high), log=searched.log))
        return float(f"{self._trial.suggest_float(searched.key, low, high, log=searched.log):.2e}")
