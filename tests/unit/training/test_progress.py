import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftchat.runs.metrics_file import MetricsFile
from peftchat.training.progress import Eta, MetricsCallback, ProgressCallback
from tests.support.cli import PROJECT
from tests.support.progress import tiny_trainer

TRAIN_KEYS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "supervised_share",
    "memory_bytes",
    "seconds",
}


class Recorder(TrainerCallback):
    """Stands last in the list and keeps a copy of every log it is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


def plain() -> tuple[io.StringIO, Console]:
    text = io.StringIO()
    return text, Console(file=text, width=40, soft_wrap=True)


def test_without_a_terminal_there_is_one_line_for_each_logged_step(tmp_path: Path) -> None:
    text, console = plain()
    trainer = tiny_trainer(
        tmp_path,
        [ProgressCallback(console)],
        max_steps=6,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
    )
    trainer.train()
    lines = text.getvalue().splitlines()
    history = [log for log in trainer.state.log_history if "train_runtime" not in log]
    assert len(lines) == len(history)
    for line, log in zip(lines, history, strict=True):
        assert line.startswith(f"step {log['step']}/6 ")
        if "eval_loss" in log:
            assert f"{log['eval_loss']:.3f}" in line
        else:
            assert f"loss {log['loss']:.3f}" in line
            assert "212" in line
            assert "63 %" in line
    assert "→" not in lines[0]
    before = next(log["eval_loss"] for log in history if "eval_loss" in log)
    assert f"{before:.3f} → " in lines[-1]


def test_metrics_lines_and_logs_left_as_they_were(tmp_path: Path) -> None:
    _, console = plain()
    recorder = Recorder()
    file = MetricsFile(tmp_path / "metrics.jsonl")
    trainer = tiny_trainer(
        tmp_path,
        [ProgressCallback(console), MetricsCallback(file), recorder],
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
    )
    trainer.train()
    history = trainer.state.log_history
    assert recorder.logs == [{key: log[key] for key in log if key != "step"} for log in history]
    lines = file.read()
    assert len(lines) == len(history) - 1
    assert not any("train_runtime" in line for line in lines)
    for line, log in zip(lines, history, strict=False):
        assert {key: line[key] for key in log} == log
        assert {"step", "epoch", "eval_loss", "eval_tokens", "seconds"} <= set(line) or set(line) == TRAIN_KEYS
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_a_resumed_run_logs_each_step_once_and_its_clock_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_on_start": True,
        "lr_scheduler_type": "constant",
    }
    file = MetricsFile(tmp_path / "metrics.jsonl")
    tiny_trainer(tmp_path, [MetricsCallback(file)], max_steps=5, **settings).train()
    first = file.read()
    checkpoint = tmp_path / "checkpoint-4"
    file.keep_through(4)
    text, console = plain()
    resumed = tiny_trainer(tmp_path, [MetricsCallback(file), ProgressCallback(console)], max_steps=8, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    lines = file.read()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 8]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    # The loss before training is remembered across the break.
    before = next(line["eval_loss"] for line in first if "eval_loss" in line)
    assert f"{before:.3f} → " in text.getvalue().splitlines()[-1]


@pytest.mark.parametrize("logs", [{}, {"loss": 1.5}, {"eval_loss": 2.5}, {"loss": float("nan")}, {"other": 3}])
def test_a_missing_key_is_null_and_other_processes_stay_silent(logs: dict[str, float], tmp_path: Path) -> None:
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    for main in (False, True):
        text, console = plain()
        file = MetricsFile(tmp_path / f"{main}.jsonl")
        state = TrainerState(global_step=3, max_steps=9, is_world_process_zero=main)
        callbacks = [ProgressCallback(console), MetricsCallback(file)]
        for callback in callbacks:
            callback.on_train_begin(args, state, control)
            callback.on_log(args, state, control, logs=dict(logs))
            callback.on_train_end(args, state, control)
        expected = 1 if main and ("loss" in logs or "eval_loss" in logs) else 0
        assert len(text.getvalue().splitlines()) == len(file.read()) == expected
        if expected and "loss" in logs:
            (line,) = file.read()
            assert set(line) == TRAIN_KEYS
            assert line["tokens_per_second"] is None
            assert str(line["loss"]) == str(logs["loss"])


def test_time_left_counts_only_steps_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Eta(step=900, total=1000)
    assert pace.seconds_left() is None
    now[0] = 50.0  # an evaluation before the first step
    pace.reach(900)
    for step in (901, 902):
        now[0] += 2.0
        pace.reach(step)
    assert pace.seconds_left() == pytest.approx(196.0)
    now[0] += 1.0
    assert pace.seconds_left() == pytest.approx(195.0)
    now[0] += 1000.0
    assert pace.seconds_left() == 0.0


def test_on_a_terminal_bars_are_drawn_and_the_cursor_comes_back(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "24"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.progress", str(tmp_path), "4", "0.05"],
        cwd=PROJECT,
        stderr=slave,
        stdout=subprocess.PIPE,
        env=environment,
    )
    os.close(slave)
    shown = bytearray()
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    standard_output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    # Libraries may print there; progress must not.
    assert not any(word in standard_output.decode() for word in ("━", "training", "loss"))
    text = shown.decode()
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "━" in words
    assert "4/4" in words
    assert "evaluation" in words
    assert "held out" in words
    assert words.count("a note before training") == 1
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()].count(4) == 2


def test_the_peak_is_this_processs_own_and_not_that_of_the_one_that_started_it():
    child = "from peftchat.training.throughput import peak_memory_bytes; print(peak_memory_bytes())"
    parent = f"import subprocess, sys; held = b'1' * 1_500_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    told = int(subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout)
    assert 50_000_000 < told < 1_200_000_000
