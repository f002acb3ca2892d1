"""How progress looks: a live display on a terminal, plain lines in a log file."""

import numbers
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import psutil
import torch
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from peftchat.console import stderr
from peftchat.formatting import format_bytes, format_clock, format_count, format_decimal, format_percent
from peftchat.runs.metrics_file import MetricsFile, Scalar


@dataclass(frozen=True)
class ProgressMetrics:
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


class Eta:
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
    def trained(self, step: int, readings: ProgressMetrics) -> None: ...  # noqa: D102
    def evaluating(self, batches: int) -> None: ...  # noqa: D102
    def evaluated(self, step: int, readings: ProgressMetrics) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class PlainDisplay:
    """One line a logged step: for log files, pipes and continuous integration."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace: Eta | None = None

    def begin(self, step: int, total: int) -> None:
        """Start counting."""
        self._pace = Eta(step, total)

    def reach(self, step: float) -> None:
        """Note the step; nothing is printed."""
        if self._pace is not None:
            self._pace.reach(step)

    def trained(self, step: int, readings: ProgressMetrics) -> None:
        """Print the readings of a logged step."""
        fields = [f"{name} {words}" for name, words in readings.words() if name != "held out"]
        left = self._pace.left() if self._pace is not None else None
        if left is not None:
            fields.append(f"{format_clock(left)} left")
        self._print(step, fields)

    def evaluating(self, batches: int) -> None:
        """Print nothing: the result is the line."""

    def evaluated(self, step: int, readings: ProgressMetrics) -> None:
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
        self._pace: Eta | None = None
        self._readings = ProgressMetrics()
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._batches = 0
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)

    def begin(self, step: int, total: int) -> None:
        """Show the training bar."""
        self._pace = Eta(step, total)
        self._training = self._bars.add_task("training", total=total, completed=step, done="", left="")
        self._live.start()

    def reach(self, step: float) -> None:
        """Move the training bar."""
        if self._pace is not None:
            self._pace.reach(step)

    def trained(self, step: int, readings: ProgressMetrics) -> None:
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

    def evaluated(self, step: int, readings: ProgressMetrics) -> None:
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


_SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "supervised_share", "memory_bytes")
_TRAIN_LINE = ("epoch", *_SHOWN)
_EVAL_LINE = ("epoch", "eval_loss", "eval_tokens")


def memory_in_use() -> int:
    """Bytes held by this process: the peak that torch allocated on its GPU, or the resident memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


class ProgressCallback(TrainerCallback):
    """Shows progress on standard error: live on a terminal, one line a logged step elsewhere.

    Only the main process shows anything. The Trainer does not tell its callbacks when training fails, so its caller
    must call `close` in a `finally` clause: a terminal would otherwise keep its cursor hidden.

    Args:
        console: where to show it; standard error by default.
    """

    def __init__(self, console: Console = stderr) -> None:
        terminal = console.file.isatty() and not console.is_dumb_terminal
        self._display: Display = LiveDisplay(console) if terminal else PlainDisplay(console)
        self._readings = ProgressMetrics()
        self._substeps = 0

    def close(self) -> None:
        """Give the terminal back; harmless when nothing is shown."""
        self._display.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, from where a resumed run goes on."""
        if not state.is_world_process_zero:
            return
        before = _number(_first_evaluation(state), "eval_loss")
        if self._readings.eval_loss_before is None and before is not None:
            self._readings = replace(self._readings, eval_loss_before=before, eval_loss=before)
        self._display.begin(state.global_step, state.max_steps)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar by one part of an accumulated step."""
        if state.is_world_process_zero:
            self._substeps += 1
            self._display.reach(state.global_step + self._substeps / args.gradient_accumulation_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the parts of a step from its beginning, and its time from after an evaluation."""
        self._substeps = 0
        if state.is_world_process_zero:
            self._display.reach(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar by one step."""
        if state.is_world_process_zero:
            self._display.reach(state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar of the evaluation by one batch."""
        loader = kwargs.get("eval_dataloader")
        if state.is_world_process_zero and loader is not None and has_length(loader):
            self._display.evaluating(len(loader))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show what was logged; the closing summary of the Trainer is left to the run's own."""
        logs: Mapping[str, Any] = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        if "eval_loss" in logs:
            loss = _number(logs, "eval_loss")
            before = self._readings.eval_loss_before if state.global_step else loss
            self._readings = replace(self._readings, eval_loss=loss, eval_loss_before=before)
            self._display.evaluated(state.global_step, self._readings)
        elif "loss" in logs:
            shown = {key: _number(logs, key) for key in _SHOWN}
            shown["memory_bytes"] = shown["memory_bytes"] or memory_in_use()
            self._readings = replace(self._readings, **shown)
            self._display.trained(state.global_step, self._readings)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state on the screen."""
        self.close()


class MetricsCallback(TrainerCallback):
    """Writes `metrics.jsonl` from what the Trainer logs, in the main process.

    A training line has `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`, `tokens_per_second`,
    `supervised_share`, `memory_bytes`, `seconds`; an evaluation line `step`, `epoch`, `eval_loss`, `eval_tokens`,
    `seconds`. What a log lacks is null; what else it holds as a number comes between. `seconds` counts from the start
    of training and goes on where an earlier part of the run stopped. A step is written once a kind: of two
    evaluations at one step, as before and after a resume, the first stays.

    Args:
        metrics_file: the file; cut it back (`keep_through`) before a resumed training begins.
    """

    def __init__(self, metrics_file: MetricsFile) -> None:
        self._file = metrics_file
        self._started: float | None = None
        self._written: set[tuple[str, int]] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, after the time that the run's earlier lines took."""
        if state.is_world_process_zero:
            self._take_up()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write one line for a training or an evaluation log, none for the closing summary."""
        logs: Mapping[str, Any] = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        kind = "eval_loss" if "eval_loss" in logs else "loss"
        if kind not in logs:
            return
        if self._started is None:
            self._take_up()
        if (kind, state.global_step) in self._written:
            return
        self._written.add((kind, state.global_step))
        self._file.append(self._line(kind, state.global_step, logs))

    def _line(self, kind: str, step: int, logs: Mapping[str, Any]) -> dict[str, Scalar]:
        keys = _EVAL_LINE if kind == "eval_loss" else _TRAIN_LINE
        line: dict[str, Scalar] = {"step": step}
        line.update({key: _number(logs, key) for key in keys})
        line.update({key: number for key in logs if (number := _number(logs, key)) is not None})
        line["seconds"] = round(time.monotonic() - (self._started or 0.0), 3)
        return line

    def _take_up(self) -> None:
        lines = self._file.read()
        spent = max((_number(line, "seconds") or 0.0 for line in lines), default=0.0)
        self._started = time.monotonic() - spent
        for line in lines:
            step = line.get("step")
            if isinstance(step, int):
                self._written.add(("eval_loss" if "eval_loss" in line else "loss", step))


def _number(logs: Mapping[str, Any], key: str) -> float | None:
    value = logs.get(key)
    # Some back ends leave a norm or a loss on its device.
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, numbers.Real) else None  # type: ignore[return-value]


def _first_evaluation(state: TrainerState) -> Mapping[str, Any]:
    for logs in state.log_history:
        if "eval_loss" in logs and logs.get("step") == 0:
            return logs
    return {}
