"""Run folder: its files, its checkpoints, and whether a run may use it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.kept_lines import KeptLines
from peftchat.recipe import dump_recipe, load_recipe
from peftchat.runs.checkpoint import Checkpoint, list_checkpoints
from peftchat.runs.claim import is_claim
from peftchat.runs.fingerprints import ALLOW_CHANGED, RunRecord
from peftchat.runs.metrics_file import MetricsFile
from peftchat.runs.resumed_settings import (
    as_saved,
    fixed_settings,
    in_order_of_cause,
    may_be_allowed,
    shown_settings,
)

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


_MODEL = ".model.tmp"

_RATE = "training.learning_rate"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: the recipe's `output_dir`.
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; a folder without it belongs to no run."""
        return self.path / "recipe.yaml"

    @property
    def summary(self) -> Path:
        """The run's results (`RunSummary`), written last."""
        return self.path / "run.json"

    @property
    def metrics(self) -> MetricsFile:
        """The logged steps."""
        return MetricsFile(self.path / "metrics.jsonl")

    @property
    def eval_losses(self) -> Path:
        """The held-out loss of each conversation."""
        return self.path / "eval_losses.jsonl"

    @property
    def eval_pairs(self) -> Path:
        """The held-out pairs of a preference run."""
        return self.path / "eval_pairs.jsonl"

    @property
    def eval_answers(self) -> Path:
        """The held-out labeled answers of a run."""
        return self.path / "eval_answers.jsonl"

    @property
    def samples(self) -> KeptLines:
        """The answers to the recipe's questions at each evaluation."""
        return KeptLines(self.path / "samples.jsonl")

    @property
    def fingerprints(self) -> Path:
        """What the run was begun on and with (`RunRecord`)."""
        return self.path / "fingerprints.json"

    @property
    def data_digests(self) -> Path:
        """The digest of each encoded example."""
        return self.path / "data_digests.npz"

    @property
    def choices(self) -> Path:
        """How the run computes its steps, for those who resume it."""
        return self.path / "choices.json"

    @property
    def rate_search(self) -> Path:
        """What `train --find-lr` found, in a folder that may hold no run yet."""
        return self.path / "find_lr.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def model_card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def checkpoint_request(self) -> Path:
        """A file that asks for a checkpoint, and is deleted when one is begun."""
        return self.path / "checkpoint.request"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's logs."""
        return self.path / "tensorboard"

    @property
    def is_run(self) -> bool:
        """Whether a run has started here."""
        return self.recipe.is_file()

    @property
    def has_started(self) -> bool:
        """Whether a run has written here, so that `recipe.yaml` is not the user's own file."""
        return self.is_run and (self.checkpoints.is_dir() or self.metrics.path.is_file() or self.is_finished)

    @property
    def is_finished(self) -> bool:
        """Whether a run has finished here."""
        return self.summary.is_file()

    def weights_bytes(self) -> int | None:
        """Return the size of the finished model's safetensors files; None without any.

        Added tokens may have an adapter of their own in a subfolder, which counts too.
        """
        folders = [self.path, *(config.parent for config in self.path.glob("*/adapter_config.json"))]
        files = [file for folder in folders for file in folder.glob("*.safetensors")]
        return sum(file.stat().st_size for file in files) if files else None

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the newest complete checkpoint."""
        newest_first = reversed(list_checkpoints(self.checkpoints))
        return next((checkpoint for checkpoint in newest_first if checkpoint.is_complete), None)

    def resumable_checkpoint(self) -> tuple[Checkpoint | None, dict[int, str]]:
        """Return the newest checkpoint that is not damaged, and what is wrong with newer ones, by step.

        Raises:
            UserError: all are damaged.
        """
        damaged: dict[int, str] = {}
        for checkpoint in reversed(list_checkpoints(self.checkpoints)):
            wrong = checkpoint.damage()
            if wrong is not None:
                damaged[checkpoint.step] = wrong
            elif checkpoint.is_complete:
                return checkpoint, damaged
        if damaged:
            step, wrong = next(iter(damaged.items()))
            raise UserError(
                f"no checkpoint can be used: {wrong}",
                where=str(Checkpoint.at_step(self.checkpoints, step).path),
                hint="Bring it back, or delete the folder of checkpoints to start over with `--resume`.",
            )
        return None, damaged

    def check_usable(self, recipe: "Recipe", *, resume: bool, allow_changed: bool = False) -> Checkpoint | None:
        """Check whether the run may use the folder, without touching it.

        Args:
            recipe: the run's recipe.
            resume: whether the folder's run is to go on.
            allow_changed: whether settings may change that a checkpoint does not depend on.

        Returns:
            The checkpoint to resume from, or None to start from scratch.

        Raises:
            UserError: the folder holds another run or other files, or is not writable.
        """
        where = f"output_dir: {self.path}"
        if not self.path.exists():
            self._check_writable()
            return None
        if not self.path.is_dir():
            raise UserError("the run folder cannot be created: a file has its name", where=where)
        if not self.is_run and all(self._is_leftover(path) for path in self.path.iterdir()):
            return None
        if not resume or not self.is_run:
            what = "the folder already holds another run" if self.is_run else "the folder already holds other files"
            hint = "Resume it with `--resume`, or" if self.is_run else "Choose an empty folder, or"
            raise UserError(what, where=where, hint=f"{hint} set another `--set output_dir=…`.")
        self._check_same_recipe(recipe, allow_changed=allow_changed)
        self.metrics.read()
        checkpoint, _ = self.resumable_checkpoint()
        if checkpoint is None and self.is_finished:
            raise UserError(
                "the run is finished and has no checkpoint to resume from",
                where=where,
                hint="Start a new run in another folder.",
            )
        return checkpoint

    def begin(self, recipe: "Recipe", checkpoint: Checkpoint | None) -> None:
        """Write the run's recipe, and delete what an interrupted run left behind the checkpoint.

        What a run did not write stays.

        Args:
            recipe: the run's recipe.
            checkpoint: the checkpoint that the run resumes from; later steps are trained, and logged, once more.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe, dump_recipe(recipe))
        for other in list_checkpoints(self.checkpoints):
            if checkpoint is not None and other.step > checkpoint.step and other.damage() is not None:
                other.move_aside("damaged")
            elif not other.is_complete:
                other.delete()
        self.metrics.keep_through(checkpoint.step if checkpoint else -1)
        if checkpoint is None:
            self.eval_losses.unlink(missing_ok=True)
            self.eval_pairs.unlink(missing_ok=True)
            self.samples.path.unlink(missing_ok=True)
        elif self.samples.path.is_file():
            self.samples.rewrite([line for line in self.samples.read() if line["step"] <= checkpoint.step])

    def release(self) -> None:
        """Delete the empty folders that libraries create before the run begins."""
        for folder in (self.tensorboard, self.checkpoints, self.path):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """Yield a temporary folder for the finished model; move its files into the run folder at the end."""
        temporary = self.path / _MODEL
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            yield temporary
            for file in sorted(temporary.glob("*")):
                target = self.path / file.name
                if target.is_dir():
                    shutil.rmtree(target)
                file.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _is_leftover(self, path: Path) -> bool:
        """Return whether a run that was interrupted before it began can have left this, and nothing of a user's.

        What a search of the learning rate wrote stays beside the run.
        """
        if path == self.rate_search:
            return True
        if is_claim(path) or path.name == _MODEL or (path.name.startswith(".") and path.suffix == ".tmp"):
            return True
        return path in (self.checkpoints, self.tensorboard) and path.is_dir() and not any(path.iterdir())

    def _check_writable(self) -> None:
        """Check that the nearest existing folder is writable."""
        parent = next(folder for folder in self.path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"{parent} is not writable", where=f"output_dir: {self.path}")

    def _check_same_recipe(self, recipe: "Recipe", *, allow_changed: bool) -> None:
        """Check that the run is resumed with the recipe it was started with."""
        try:
            before = load_recipe(self.recipe, to_train=False, upgrade=True).recipe
        except UserError as error:
            raise UserError(
                f"the run's own recipe cannot be read: {error.message}",
                where=error.where or str(self.recipe),
                hint="Replace it by the recipe that the run was started with.",
            ) from error
        # Of paths the content is compared, where it is known.
        known = RunRecord.read(self.fingerprints) is not None
        old, new = (fixed_settings(one, with_paths=not known) for one in (before, as_saved(recipe)))
        if recipe.training.learning_rate == "auto":
            new[_RATE] = old[_RATE]  # A resumed run keeps the rate that it was started with.
        for key in in_order_of_cause(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or (allow_changed and may_be_allowed(key)):
                continue
            hint = "Resume with the same value, or start a new run in another folder."
            if may_be_allowed(key):
                hint = f"Resume with the same value, or add `{ALLOW_CHANGED}` to go on and record the change."
            was, now = shown_settings(old.get(key), new.get(key))
            raise UserError(
                f"the run was started with {key}: {was}, and is resumed with {now}",
                where=str(self.recipe),
                hint=hint,
            )
