"""Hyperparameter search on the first seed: learning rates, or optuna's TPE."""

import importlib.util
import logging
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

    def ask(self) -> Settings | None:
        """Return the next settings to try; None after the last."""

    def tell(self, loss: float | None) -> None:
        """Record the held-out loss of the settings returned last; None if the run failed."""


class LearningRateGrid:
    """Learning rates in a fixed order.

    Args:
        learning_rates: at least one.
    """

    def __init__(self, learning_rates: Sequence[float]) -> None:
        self._remaining = list(learning_rates)
        self.num_trials = len(self._remaining)

    def ask(self) -> Settings | None:
        """Return the next learning rate."""
        return {LEARNING_RATE: self._remaining.pop(0)} if self._remaining else None

    def tell(self, loss: float | None) -> None:
        """Ignore the loss: a grid does not depend on it."""


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
