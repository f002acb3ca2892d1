"""Probe: measure a few training steps on the longest batch, in a child process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.child_process import child_environment
from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from peftchat.planning.plan import TrainingPlan
    from peftchat.planning.settings import PlanSettings
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
        text = long_pairs(recipe, settings) if recipe.has_pairs else _long_examples(settings.length, settings.batch)
        (folder / "conversations.jsonl").write_text(text, encoding="utf-8")
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


def long_pairs(recipe: "Recipe", settings: "PlanSettings") -> str:
    """Return pairs, or labeled answers, as long as the longest ones of a plan, with its share of supervised tokens."""
    from peftchat.chat_template.loss_mask import loss_mask_table
    from peftchat.conversation import Conversation, Message
    from peftchat.dataset.pairs import shared_tokens
    from peftchat.models.source import ModelSource
    from peftchat.planning.planner import pair_layout
    from peftchat.training.context import load_chat_format

    encoder, mask = load_chat_format(recipe).encoder(), loss_mask_table(recipe.chat.loss_policy)
    layout = pair_layout(recipe, settings.device, ModelSource.of_recipe(recipe).config())
    answers = 1 if layout == "rows" or recipe.has_labels else 2

    def words(question: int, answer: int) -> tuple[str, str, str]:
        return "on " * question + "?", "on " * answer + "yes", "go " * answer + "no"

    def tokens(question: int, answer: int) -> tuple[int, int]:
        """Return the tokens of a row or line, and those of them with a target."""
        asked, *both = words(question, answer)
        chosen, rejected = encoder.batch(
            [Conversation((Message("user", asked), Message("assistant", one)), "") for one in both]
        )
        targets = int(mask[chosen.token_tags].sum()) * answers
        if answers == 1:
            return max(len(chosen.ids), len(rejected.ids)), targets
        shared = shared_tokens(chosen, rejected, mask) if layout == "shared" else 0
        return len(chosen.ids) + len(rejected.ids) - shared, targets

    answer = _most(lambda number: tokens(0, number)[1] <= settings.supervised * settings.length)
    question = _most(lambda number: tokens(number, answer)[0] <= settings.length)
    asked, good, bad = words(question, answer)
    records: list[dict[str, object]] = [{"prompt": asked, "chosen": good, "rejected": bad}]
    if recipe.has_labels:
        records = [{"prompt": asked, "completion": text, "label": text is good} for text in (good, bad)]
    return "".join(json.dumps(record) + "\n" for record in records) * (2 * settings.batch)


def _most(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
