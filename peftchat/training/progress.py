"""Progress: a live display on a terminal, plain lines in a log file, and `metrics.jsonl`."""

import numbers
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
    """The newest values of a run; None until they are measured.

    Losses are in nats per supervised token, or means over pairs of answers. Memory is in bytes, and shares are
    fractions. `pairs_right` is the share of pairs whose chosen answer has the higher reward, `margin` the mean
    difference of the rewards.
    """

    loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    supervised_share: float | None = None
    memory_bytes: float | None = None
    pairs_right: float | None = None
    margin: float | None = None
    eval_pairs_right: float | None = None
    eval_margin: float | None = None
    kl: float | None = None
    eval_kl: float | None = None

    def labeled(self) -> list[tuple[str, str]]:
        """Return the name and the formatted value of each metric that was measured."""
        fields = [
            ("loss", format_decimal(self.loss), self.loss),
            (self._unit_right(), format_percent(self.pairs_right), self.pairs_right),
            ("margin", format_decimal(self.margin), self.margin),
            ("held out", self.held_out(), self.eval_loss),
            ("lr", format_decimal(self.learning_rate), self.learning_rate),
            ("grad norm", format_decimal(self.grad_norm), self.grad_norm),
            ("tokens/s", format_count(self.tokens_per_second), self.tokens_per_second),
            ("supervised", format_percent(self.supervised_share), self.supervised_share),
            ("memory", format_bytes(self.memory_bytes), self.memory_bytes),
        ]
        return [(name, text) for name, text, value in fields if value is not None]

    def held_out(self) -> str:
        """Return the held-out loss, after the one before training if that was measured."""
        if self.eval_loss_before is None or self.eval_loss_before == self.eval_loss:
            return format_decimal(self.eval_loss) + self._held_out_pairs()
        return f"{format_decimal(self.eval_loss_before)} → {format_decimal(self.eval_loss)}{self._held_out_pairs()}"

    def _held_out_pairs(self) -> str:
        """Return what is told of held-out pairs, behind their loss."""
        if self.eval_pairs_right is None:
            return ""
        right = f"  {self._unit_right()} {format_percent(self.eval_pairs_right)}"
        return right if self.eval_margin is None else f"{right}  margin {format_decimal(self.eval_margin)}"

    def _unit_right(self) -> str:
        """Return what is right: single answers have a KL term, which pairs have not."""
        return "pairs right" if self.kl is None and self.eval_kl is None else "answers right"


class Eta:
    """Estimates the time left from the last 100 updates of this process.

    Args:
        step: the step at the start; not 0 if the run is resumed.
        total: the last step.
    """

    def __init__(self, step: float, total: int) -> None:
        self.total = total
        self._marks = deque([(step, time.monotonic())], maxlen=100)

    @property
    def step(self) -> float:
        """Steps done; a fraction inside an accumulated step."""
        return self._marks[-1][0]

    def reach(self, step: float) -> None:
        """Note that `step` is done; the time before the first step, such as an evaluation, does not count."""
        if step <= self._marks[0][0]:
            self._marks.clear()
        self._marks.append((step, time.monotonic()))

    def seconds_left(self) -> float | None:
        """Return the seconds to the last step; None before the first step."""
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        expected = (self.total - last) * (end - begin) / (last - first)
        return max(0.0, expected - (time.monotonic() - end))


class PlainDisplay:
    """Prints one line per logged step, for log files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._eta: Eta | None = None

    def begin(self, step: int, total: int) -> None:
        """Start the clock."""
        self._eta = Eta(step, total)

    def reach(self, step: float) -> None:
        """Note the step; print nothing."""
        if self._eta is not None:
            self._eta.reach(step)

    def trained(self, step: int, metrics: ProgressMetrics) -> None:
        """Print the metrics of a logged step."""
        fields = [f"{name} {text}" for name, text in metrics.labeled() if name != "held out"]
        left = self._eta.seconds_left() if self._eta is not None else None
        if left is not None:
            fields.append(f"{format_clock(left)} left")
        self._print(step, fields)

    def evaluating(self, batches: int) -> None:
        """Print nothing; `evaluated` prints the result."""

    def evaluated(self, step: int, metrics: ProgressMetrics) -> None:
        """Print the held-out loss."""
        self._print(step, [f"held-out loss {metrics.held_out()}"])

    def close(self) -> None:
        """Do nothing."""

    def _print(self, step: int, fields: list[str]) -> None:
        total = self._eta.total if self._eta is not None else 0
        prefix = f"step {step}/{total} ({format_percent(step / total)})" if total else f"step {step}"
        self._console.print("  ".join([prefix, *fields]), markup=False, soft_wrap=True)


class LiveDisplay:
    """Shows bars and metrics at the bottom of a terminal; other output scrolls above them."""

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
        self._eta: Eta | None = None
        self._metrics = ProgressMetrics()
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._batches = 0
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)

    def begin(self, step: int, total: int) -> None:
        """Show the training bar."""
        self._eta = Eta(step, total)
        self._training = self._bars.add_task("training", total=total, completed=step, done="", left="")
        self._live.start()

    def reach(self, step: float) -> None:
        """Advance the training bar."""
        if self._eta is not None:
            self._eta.reach(step)

    def trained(self, step: int, metrics: ProgressMetrics) -> None:
        """Show the metrics of a logged step."""
        self._metrics = metrics

    def evaluating(self, batches: int) -> None:
        """Advance the evaluation bar by one batch; create it if there is none."""
        if self._evaluation is None:
            self._batches = 0
            self._evaluation = self._bars.add_task("evaluation", total=batches, done="", left="")
            self._live.start()
        self._batches += 1
        self._bars.update(self._evaluation, completed=self._batches, done=f"{self._batches}/{batches}")
        if self._batches == 1:
            self._live.refresh()

    def evaluated(self, step: int, metrics: ProgressMetrics) -> None:
        """Remove the evaluation bar and show the held-out loss."""
        self._metrics = metrics
        if self._evaluation is not None:
            self._bars.remove_task(self._evaluation)
            self._evaluation = None
        if self._training is None:
            self.close()

    def close(self) -> None:
        """Stop updating, and leave the last state on the screen."""
        self._live.stop()

    def _render(self) -> RenderableType:
        if self._training is not None and self._eta is not None:
            left = self._eta.seconds_left()
            done = self._eta.step >= self._eta.total
            self._bars.update(
                self._training,
                completed=self._eta.step,
                done=f"{int(self._eta.step)}/{self._eta.total}",
                left="" if left is None or done else f"{format_clock(left)} left",
            )
        fields = [Text.assemble((f"{name} ", "dim"), text) for name, text in self._metrics.labeled()]
        return Group(self._bars, Columns(fields, padding=(0, 3)))


Display = PlainDisplay | LiveDisplay

_SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "supervised_share", "memory_bytes")
_PAIRS_SHOWN = {"pairs_right": "rewards/accuracies", "margin": "rewards/margins", "kl": "kl"}
"""Names of `ProgressMetrics` -> the trainer's names of what only pairs of answers have."""
_TRAIN_LINE = ("epoch", *_SHOWN)
_EVAL_LINE = ("epoch", "eval_loss", "eval_tokens")


def memory_in_use() -> int:
    """Return the bytes of this process: torch's peak on its GPU, or the resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


class ProgressCallback(TrainerCallback):
    """Shows progress on standard error: live on a terminal, one line per logged step elsewhere.

    Only the main process shows it. The Trainer does not notify its callbacks when training fails, so its caller must
    call `close` in a `finally` clause; otherwise a terminal keeps its cursor hidden.

    Args:
        console: where to show progress.
    """

    def __init__(self, console: Console = stderr) -> None:
        terminal = console.file.isatty() and not console.is_dumb_terminal
        self._display: Display = LiveDisplay(console) if terminal else PlainDisplay(console)
        self._metrics = ProgressMetrics()
        self._substeps = 0

    def close(self) -> None:
        """Stop the display, if it is running."""
        self._display.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, at the step of the checkpoint if the run is resumed."""
        if not state.is_world_process_zero:
            return
        before = _number(_first_evaluation(state), "eval_loss")
        if self._metrics.eval_loss_before is None and before is not None:
            self._metrics = replace(self._metrics, eval_loss_before=before, eval_loss=before)
        self._display.begin(state.global_step, state.max_steps)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar by one micro-batch of an accumulated step."""
        if state.is_world_process_zero:
            self._substeps += 1
            self._display.reach(state.global_step + self._substeps / args.gradient_accumulation_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting micro-batches, and leave the time of an evaluation out of the step."""
        self._substeps = 0
        if state.is_world_process_zero:
            self._display.reach(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar by one step."""
        if state.is_world_process_zero:
            self._display.reach(state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar of the evaluation by one batch."""
        loader = kwargs.get("eval_dataloader")
        if state.is_world_process_zero and loader is not None and has_length(loader):
            self._display.evaluating(len(loader))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the logged metrics, except for the Trainer's closing summary."""
        logs: Mapping[str, Any] = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        if "eval_loss" in logs:
            loss = _number(logs, "eval_loss")
            before = self._metrics.eval_loss_before if state.global_step else loss
            pairs = {f"eval_{name}": _number(logs, f"eval_{key}") for name, key in _PAIRS_SHOWN.items()}
            self._metrics = replace(self._metrics, eval_loss=loss, eval_loss_before=before, **pairs)
            self._display.evaluated(state.global_step, self._metrics)
        elif "loss" in logs:
            shown = {key: _number(logs, key) for key in _SHOWN}
            shown |= {name: _number(logs, key) for name, key in _PAIRS_SHOWN.items()}
            shown["memory_bytes"] = shown["memory_bytes"] or memory_in_use()
            self._metrics = replace(self._metrics, **shown)
            self._display.trained(state.global_step, self._metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state on the screen."""
        self.close()


class MetricsCallback(TrainerCallback):
    """Writes the Trainer's logs to `metrics.jsonl`, in the main process.

    A training line has `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`, `tokens_per_second`,
    `supervised_share`, `memory_bytes`, `seconds`. An evaluation line has `step`, `epoch`, `eval_loss`, `eval_tokens`,
    `seconds`; and the two of each kind of text that the targets have, such as `eval_loss_reasoning`. Lines of a
    preference run have the metrics of pairs too, by TRL's names, such as `rewards/margins`. Keys that a log lacks are
    null; its other numbers come between. `seconds` counts from the start of training, earlier parts of a resumed run
    included. Each step has at most one training and one evaluation line: of two evaluations at one step, as before and
    after a resume, the first stays.

    Args:
        metrics_file: the file; a resumed run must cut it back (`keep_through`) before training begins.
    """

    def __init__(self, metrics_file: MetricsFile) -> None:
        self._file = metrics_file
        self._started: float | None = None
        self._written: set[tuple[str, int]] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock at the time of the run's last line."""
        if state.is_world_process_zero:
            self._continue()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a line for a training or an evaluation log, none for the closing summary."""
        logs: Mapping[str, Any] = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        kind = "eval_loss" if "eval_loss" in logs else "loss"
        if kind not in logs:
            return
        if self._started is None:
            self._continue()
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

    def _continue(self) -> None:
        lines = self._file.read()
        spent = max((_number(line, "seconds") or 0.0 for line in lines), default=0.0)
        self._started = time.monotonic() - spent
        for line in lines:
            step = line.get("step")
            if isinstance(step, int):
                self._written.add(("eval_loss" if "eval_loss" in line else "loss", step))


def _number(logs: Mapping[str, Any], key: str) -> float | None:
    value = logs.get(key)
    # Some backends leave a norm or a loss on its device.
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, numbers.Real) else None  # type: ignore[return-value]


def _first_evaluation(state: TrainerState) -> Mapping[str, Any]:
    for logs in state.log_history:
        if "eval_loss" in logs and logs.get("step") == 0:
            return logs
    return {}
