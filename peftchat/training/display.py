"""How progress looks: a live display on a terminal, plain lines in a log file."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from peftchat.formatting import format_bytes, format_clock, format_count, format_decimal, format_percent


@dataclass(frozen=True)
class Readings:
    """The newest value of everything that is shown; `None` until it was measured.

    Losses are in nats a supervised token, memory in bytes, the supervised share is a fraction.
    """

    loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    supervised_share: float | None = None
    memory_bytes: float | None = None

    def words(self) -> list[tuple[str, str]]:
        """Name and value of each reading there is."""
        fields = [
            ("loss", format_decimal(self.loss), self.loss),
            ("held out", self.held_out(), self.eval_loss),
            ("lr", format_decimal(self.learning_rate), self.learning_rate),
            ("grad norm", format_decimal(self.grad_norm), self.grad_norm),
            ("tokens/s", format_count(self.tokens_per_second), self.tokens_per_second),
            ("supervised", format_percent(self.supervised_share), self.supervised_share),
            ("memory", format_bytes(self.memory_bytes), self.memory_bytes),
        ]
        return [(name, words) for name, words, value in fields if value is not None]

    def held_out(self) -> str:
        """The held-out loss, with the one before training where that was measured."""
        if self.eval_loss_before is None or self.eval_loss_before == self.eval_loss:
            return format_decimal(self.eval_loss)
        return f"{format_decimal(self.eval_loss_before)} → {format_decimal(self.eval_loss)}"


class Pace:
    """Time left, from the last steps that were made here; a resumed run's earlier steps do not count."""

    def __init__(self, step: float, total: int) -> None:
        self.total = total
        self._marks = deque([(step, time.monotonic())], maxlen=100)

    @property
    def step(self) -> float:
        """Steps done, with a fraction inside an accumulated step."""
        return self._marks[-1][0]

    def reach(self, step: float) -> None:
        """Note that `step` is done now. Time before the first step, such as an evaluation's, is no part of the pace."""
        if step <= self._marks[0][0]:
            self._marks.clear()
        self._marks.append((step, time.monotonic()))

    def left(self) -> float | None:
        """Seconds to the last step, or `None` before there is anything to judge by."""
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        expected = (self.total - last) * (end - begin) / (last - first)
        return max(0.0, expected - (time.monotonic() - end))


class Display(Protocol):
    """What the callback tells a display. `begin` comes first where there is training; `close` may come at any time."""

    def begin(self, step: int, total: int) -> None: ...  # noqa: D102
    def reach(self, step: float) -> None: ...  # noqa: D102
    def trained(self, step: int, readings: Readings) -> None: ...  # noqa: D102
    def evaluating(self, batches: int) -> None: ...  # noqa: D102
    def evaluated(self, step: int, readings: Readings) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class PlainDisplay:
    """One line a logged step: for log files, pipes and continuous integration."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace: Pace | None = None

    def begin(self, step: int, total: int) -> None:
        """Start counting."""
        self._pace = Pace(step, total)

    def reach(self, step: float) -> None:
        """Note the step; nothing is printed."""
        if self._pace is not None:
            self._pace.reach(step)

    def trained(self, step: int, readings: Readings) -> None:
        """Print the readings of a logged step."""
        fields = [f"{name} {words}" for name, words in readings.words() if name != "held out"]
        left = self._pace.left() if self._pace is not None else None
        if left is not None:
            fields.append(f"{format_clock(left)} left")
        self._print(step, fields)

    def evaluating(self, batches: int) -> None:
        """Print nothing: the result is the line."""

    def evaluated(self, step: int, readings: Readings) -> None:
        """Print the held-out loss."""
        self._print(step, [f"held-out loss {readings.held_out()}"])

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, step: int, fields: list[str]) -> None:
        total = self._pace.total if self._pace is not None else 0
        place = f"step {step}/{total} ({format_percent(step / total)})" if total else f"step {step}"
        self._console.print("  ".join([place, *fields]), markup=False, soft_wrap=True)


class LiveDisplay:
    """Bars and readings that stay in place at the bottom of a terminal; other output scrolls above them."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[done]}"),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=console,
            expand=True,
        )
        self._pace: Pace | None = None
        self._readings = Readings()
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._batches = 0
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)

    def begin(self, step: int, total: int) -> None:
        """Show the training bar."""
        self._pace = Pace(step, total)
        self._training = self._bars.add_task("training", total=total, completed=step, done="", left="")
        self._live.start()

    def reach(self, step: float) -> None:
        """Move the training bar."""
        if self._pace is not None:
            self._pace.reach(step)

    def trained(self, step: int, readings: Readings) -> None:
        """Show the readings of a logged step."""
        self._readings = readings

    def evaluating(self, batches: int) -> None:
        """Move the evaluation bar by one batch, and show it first if there is none."""
        if self._evaluation is None:
            self._batches = 0
            self._evaluation = self._bars.add_task("evaluation", total=batches, done="", left="")
            self._live.start()
        self._batches += 1
        self._bars.update(self._evaluation, completed=self._batches, done=f"{self._batches}/{batches}")
        if self._batches == 1:
            self._live.refresh()

    def evaluated(self, step: int, readings: Readings) -> None:
        """Take the evaluation bar away and show the held-out loss."""
        self._readings = readings
        if self._evaluation is not None:
            self._bars.remove_task(self._evaluation)
            self._evaluation = None
        if self._training is None:
            self.close()

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        self._live.stop()

    def _render(self) -> RenderableType:
        if self._training is not None and self._pace is not None:
            left = self._pace.left()
            done = self._pace.step >= self._pace.total
            self._bars.update(
                self._training,
                completed=self._pace.step,
                done=f"{int(self._pace.step)}/{self._pace.total}",
                left="" if left is None or done else f"{format_clock(left)} left",
            )
        fields = [Text.assemble((f"{name} ", "dim"), words) for name, words in self._readings.words()]
        return Group(self._bars, Columns(fields, padding=(0, 3)))
