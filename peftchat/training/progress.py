"""What a training run shows while it runs, and what it writes down for later: two callbacks of the Trainer."""

import numbers
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from peftchat.console import stderr
from peftchat.runs.metrics_file import MetricsFile, Scalar
from peftchat.training.display import Display, LiveDisplay, PlainDisplay, Readings

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
        self._readings = Readings()
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
