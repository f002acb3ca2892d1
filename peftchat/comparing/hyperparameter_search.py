"""Which settings are tried on the first seed: a grid of learning rates, or ranges that optuna's TPE looks through."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peftchat.comparing.candidates import Settings
from peftchat.errors import UserError

RATE = "training.learning_rate"


class Search(Protocol):
    """Proposes settings one after the other and hears how each did."""

    @property
    def size(self) -> int:
        """How many settings it will propose."""

    def ask(self) -> Settings | None:
        """The next settings to try, None after the last."""

    def tell(self, loss: float | None) -> None:
        """The held-out loss that the settings asked for last led to; None if they failed."""


class RateGrid:
    """Learning rates, one after the other.

    Args:
        rates: at least one.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self._rates = list(rates)
        self.size = len(self._rates)

    def ask(self) -> Settings | None:
        """The next rate."""
        return {RATE: self._rates.pop(0)} if self._rates else None

    def tell(self, loss: float | None) -> None:
        """Nothing to learn: a grid goes on as it is."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a key may take: from `low` to `high`, whole numbers or not, even or even in their logarithm."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool


def parse_range(flag: str) -> Range:
    """`training.learning_rate=1e-5..1e-3:log` or `adapter.r=4..64`.

    Raises:
        UserError: not of that form, or empty.
    """
    key, equals, text = (part.strip() for part in flag.partition("="))
    span, _, scale = text.partition(":")
    low, dots, high = span.partition("..")
    where = f"--search {flag}"
    hint = "Write KEY=LOW..HIGH, or KEY=LOW..HIGH:log."
    if not (equals and key and dots) or scale not in ("", "log"):
        raise UserError("not a range", where=where, hint=hint)
    try:
        first, last = float(low), float(high)
    except ValueError:
        raise UserError("the ends of a range are numbers", where=where, hint=hint) from None
    if not first < last or (scale == "log" and first <= 0):
        what = "a range on a logarithmic scale is above 0 and rises" if scale else "a range rises"
        raise UserError(what, where=where, hint=hint)
    whole = all(end.strip().lstrip("-").isdecimal() for end in (low, high))
    return Range(key, first, last, scale == "log", whole)


def check_optuna() -> None:
    """Refuse where the optional library is missing.

    Raises:
        UserError: with the command that installs it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "a search over ranges needs optuna, which is not installed",
            where="--trials",
            hint="pip install 'peftchat[sweep]'",
        )


class TreeParzen:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., 2011).

    It is seeded and asked in order, so an interrupted comparison proposes the same settings again, whose finished runs
    are then found in the folder.

    Args:
        trials: how many settings to try.
        ranges: what to look through.
        fixed: settings beside them.
    """

    def __init__(self, trials: int, ranges: Sequence[Range], fixed: Settings, seed: int) -> None:
        import optuna

        logging.getLogger("optuna").setLevel(logging.ERROR)
        self.size = trials
        self._left = trials
        self._ranges = ranges
        self._fixed = fixed
        # The library starts with ten random trials, which would be all that most comparisons have.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(2, trials // 2)))
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._trial: Any = None

    def ask(self) -> Settings | None:
        """The next settings, numbers to three digits."""
        if not self._left:
            return None
        self._left -= 1
        self._trial = self._study.ask()
        return {**self._fixed, **{span.key: self._value(span) for span in self._ranges}}

    def tell(self, loss: float | None) -> None:
        """Let the estimator learn from a run."""
        import optuna

        if loss is None:
            self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._trial, loss)

    def _value(self, span: Range) -> float | int:
        if span.whole:
            return int(self._trial.suggest_int(span.key, int(span.low), int(span.high), log=span.log))
        return float(f"{self._trial.suggest_float(span.key, span.low, span.high, log=span.log):.2e}")
