"""A real Trainer on a model of a few thousand parameters, logging what peftchat's trainer logs.

Run as a program it trains with progress on standard error: `python -m tests.support.progress FOLDER STEPS`.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peftchat.console import stderr
from peftchat.runs.metrics_file import MetricsFile
from peftchat.training.progress import MetricsCallback, ProgressCallback, memory_in_use


class LoggingTrainer(Trainer):
    """Adds to the training logs what the real trainer measures, and can be slowed down to be watched."""

    pause = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"tokens_per_second": 212.4, "supervised_share": 0.63, "memory_bytes": memory_in_use()}
        if "eval_loss" in logs:
            logs["eval_tokens"] = 128
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(self.pause)
        return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(self.pause)
        return super().prediction_step(*args, **kwargs)


def tiny_trainer(folder: Path, callbacks: list[TrainerCallback], **arguments: Any) -> LoggingTrainer:
    """A trainer that logs every step unless told otherwise; saves nothing unless told to."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    rows = [{"input_ids": (ids := torch.randint(0, 64, (8,))), "labels": ids} for _ in range(32)]
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = LoggingTrainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    target, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    progress = ProgressCallback()
    metrics = MetricsCallback(MetricsFile(target / "metrics.jsonl"))
    shown = tiny_trainer(
        target,
        [progress, metrics],
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=5,
        eval_on_start=True,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
    )
    shown.pause = pause
    try:
        stderr.print("a note before training")
        shown.train()
    finally:
        progress.close()
