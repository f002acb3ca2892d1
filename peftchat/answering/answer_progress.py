"""Progress of work that is counted: a bar on a terminal, a line every ten seconds elsewhere."""

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from peftchat.console import stderr
from peftchat.formatting import format_clock, format_count

_SECONDS_BETWEEN_LINES = 10.0


class CountProgress:
    """Shows what is done, at which rate, and the time left, on standard error. Use as a context manager.

    Args:
        what: what is done, and with what.
        total: how much there is.
        done: how much was done before.
        amounts: what else is counted, in the plural, for its rate: `tokens`.
    """

    def __init__(self, what: str, total: int, done: int = 0, amounts: str = "tokens") -> None:
        self._what = what
        self._total = total
        self._before = self._done = done
        self._amounts = amounts
        self._amount = 0
        self._started = self._shown = time.monotonic()
        self._is_live = stderr.is_terminal and not stderr.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            console=stderr,
            disable=not self._is_live,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, rates="")

    def __enter__(self) -> "CountProgress":
        self._bar.start()
        return self

    def advance(self, count: int, amount: int) -> None:
        """Count what was done, and the amount of it."""
        self._done += count
        self._amount += amount
        now = time.monotonic()
        if self._is_live:
            self._bar.update(self._task, completed=self._done, rates=self._rates(now))
        elif now - self._shown >= _SECONDS_BETWEEN_LINES and self._done < self._total:
            self._shown = now
            stderr.print(f"{self._what}: {self._done:,} of {self._total:,}, {self._rates(now)}", markup=False)

    def _rates(self, now: float) -> str:
        seconds = max(now - self._started, 1e-9)
        here = self._done - self._before
        left = seconds / here * (self._total - self._done) if here else 0.0
        return f"{format_count(self._amount / seconds)} {self._amounts}/s, {format_clock(left)} left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
