"""The proof of a prediction: train on the longest batch here, in a process of its own, and measure."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from peftchat.planning.plan import TrainingPlan
    from peftchat.recipe import Recipe

_STEPS = 3
"""The optimizer's states are made by the first step, and the allocator settles by the third."""


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What was measured.

    Attributes:
        peak: bytes that the process held at most: allocated by torch on a GPU, resident without one.
        seconds: of a step.
    """

    peak: int
    seconds: float


def measure_run(recipe: "Recipe", plan: "TrainingPlan") -> MeasuredRun:
    """Train a few steps on rows as long as the recipe's longest, and throw the run away.

    Raises:
        UserError: the plan is for a device that is not here, or for several processes.
        VerificationError: the training failed, by running out of memory perhaps.
    """
    from peftchat.planning.hardware import this_machine
    from peftchat.recipe import dump_recipe
    from peftchat.runs.run_folder import RunFolder
    from peftchat.runs.run_summary import RunSummary

    settings = plan.settings
    if this_machine(1).device != settings.device:
        raise UserError("a probe runs on this machine", where="--gpu", hint="Leave `--gpu` out.")
    if settings.processes > 1:
        raise UserError("a probe runs in one process", where="--gpus", hint="Leave `--gpus` out.")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "rows.jsonl").write_text(_long_examples(settings.length, settings.batch), encoding="utf-8")
        path = place / "recipe.yaml"
        run = RunFolder(place / "run")
        path.write_text(dump_recipe(_measured(recipe, place)), encoding="utf-8")
        command = [sys.executable, "-m", "peftchat", "train", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        if done.returncode or not run.is_finished:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise VerificationError(f"the probe's training ended early: {last}")
        summary = RunSummary.read(run)
    return MeasuredRun(summary.peak_memory_bytes or 0, (summary.seconds or 0.0) / _STEPS)


def _measured(recipe: "Recipe", folder: Path) -> "Recipe":
    """The recipe on synthetic long rows, for a few steps, saving and evaluating nothing."""
    data = recipe.data.model_copy(
        update={
            "train": (type(recipe.data.train[0])(path=str(folder / "rows.jsonl")),),
            "eval": None,
            "eval_fraction": None,
            "max_train_rows": None,
        }
    )
    training = recipe.training.model_copy(
        update={"max_steps": _STEPS, "warmup_steps": 0.0, "save_strategy": "no", "eval_strategy": "no",
                "eval_steps": None, "eval_on_start": False, "logging_steps": 1, "report_to": ()}
    )  # fmt: skip
    return recipe.model_copy(update={"data": data, "training": training, "output_dir": str(folder / "run")})


def _long_examples(length: int, batch: int) -> str:
    """Conversations of many exchanges: every row of the run will be as long as the recipe lets it be."""
    exchange = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "and on and on"}]
    # No tokenizer makes fewer than eight tokens of an exchange; what is too long is cut to whole exchanges.
    row = json.dumps({"messages": exchange * (length // 8 + 1)})
    return f"{row}\n" * (2 * batch)
