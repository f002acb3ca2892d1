"""Probe: measure a few training steps on the longest batch, in a child process."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.child_process import child_environment
from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from peftchat.planning.plan import TrainingPlan
    from peftchat.recipe import Recipe

_STEPS = 3
"""The first step creates the optimizer states; by the third the allocator is stable."""


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """The measurement of a probe.

    Attributes:
        peak_bytes: peak memory of the process: allocated by torch on a GPU, resident on a CPU.
        seconds: time per step.
    """

    peak_bytes: int
    seconds: float


def measure_run(recipe: "Recipe", plan: "TrainingPlan") -> MeasuredRun:
    """Train a few steps on the longest sequences, and delete the run.

    Raises:
        UserError: the plan is for another device, or for several processes.
        VerificationError: the training failed, for example out of memory.
    """
    from peftchat.planning.hardware import this_machine
    from peftchat.recipe import dump_recipe
    from peftchat.runs.run_folder import RunFolder
    from peftchat.runs.run_summary import RunSummary

    settings = plan.settings
    if this_machine(1).device != settings.device:
        raise UserError("`--probe` measures this machine only", where="--gpu", hint="Leave out `--gpu`.")
    if settings.processes > 1:
        raise UserError(
            f"`--probe` runs one process, and the plan has {settings.processes}",
            where="--gpus",
            hint="Use `--gpus 1 --set distributed.strategy=single`.",
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "conversations.jsonl").write_text(_long_examples(settings.length, settings.batch), encoding="utf-8")
        path = folder / "recipe.yaml"
        run = RunFolder(folder / "run")
        path.write_text(dump_recipe(_probe_recipe(recipe, folder)), encoding="utf-8")
        command = [sys.executable, "-m", "peftchat", "train", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
        if done.returncode or not run.is_finished:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise VerificationError(f"the training of the probe failed: {last}")
        summary = RunSummary.read(run)
    return MeasuredRun(summary.peak_memory_bytes or 0, (summary.seconds or 0.0) / _STEPS)


def _probe_recipe(recipe: "Recipe", folder: Path) -> "Recipe":
    """Return the recipe for a few steps on long synthetic conversations.

    It saves and evaluates nothing.
    """
    data = recipe.data.model_copy(
        update={
            "train": (type(recipe.data.train[0])(path=str(folder / "conversations.jsonl")),),
            "eval": None,
            "eval_fraction": None,
            "max_train_samples": None,
        }
    )
    training = recipe.training.model_copy(
        update={"max_steps": _STEPS, "warmup_steps": 0.0, "save_strategy": "no", "eval_strategy": "no",
                "eval_steps": None, "eval_on_start": False, "logging_steps": 1, "report_to": ()}
    )  # fmt: skip
    return recipe.model_copy(update={"data": data, "training": training, "output_dir": str(folder / "run")})


def _long_examples(length: int, batch: int) -> str:
    """Return conversations that fill every example to its longest length."""
    turns = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "and on and on"}]
    # The two turns have at least eight tokens with any tokenizer; truncation removes the rest.
    line = json.dumps({"messages": turns * (length // 8 + 1)})
    return f"{line}\n" * (2 * batch)
