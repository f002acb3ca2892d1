"""Checkpoints that are whole: a marker written last says so, and resuming trusts nothing else."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, VerificationError
from peftchat.files import write_text
from peftchat.recipe import dump_recipe, load_recipe

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


MARKER = "complete.json"


def mark_complete(checkpoint: Path, totals: list[dict[str, Any]]) -> None:
    """Check a checkpoint's files and write its marker.

    Args:
        checkpoint: the folder, all its files written.
        totals: the counts of each process up to here.

    Raises:
        VerificationError: a file is empty.
    """
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    empty = [name for name, size in sizes.items() if size == 0]
    if empty:
        raise VerificationError(f"{checkpoint}: the checkpoint's file {empty[0]} is empty")
    write_text(checkpoint / MARKER, json.dumps({"files": sizes, "totals": totals}, indent=1))


def latest_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoints` folder, or None."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((checkpoint for checkpoint in found if _is_complete(checkpoint)), None)


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete checkpoints that a killed run left half-written; returns what was deleted."""
    broken = [checkpoint for checkpoint in folder.glob("checkpoint-*") if not _is_complete(checkpoint)]
    for checkpoint in broken:
        shutil.rmtree(checkpoint)
    return broken


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def token_counts_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The counts of each process at a checkpoint."""
    totals: list[dict[str, Any]] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["totals"]
    return totals


def _is_complete(checkpoint: Path) -> bool:
    marker = checkpoint / MARKER
    if not marker.is_file():
        return False
    sizes = json.loads(marker.read_text(encoding="utf-8"))["files"]
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


RECIPE = "recipe.yaml"
SUMMARY = "run.json"
METRICS = "metrics.jsonl"

# What may change between a run and its continuation: how long it goes on, what is said about it, and where it runs.
_FREE = {
    "training": {
        "max_steps",
        "num_train_epochs",
        "max_tokens",
        "max_minutes",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "report_to",
        "run_name",
        "dataloader_num_workers",
        "per_device_eval_batch_size",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_compile",
        "rows_per_step",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    },
    "distributed": {"processes", "nodes", "strategy", "offload", "deepspeed_config"},
    "model": {"attention"},
}


class RunFolder:
    """One run's folder.

    Args:
        path: the recipe's `output_dir`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / METRICS
        self.summary = path / SUMMARY

    @property
    def is_finished(self) -> bool:
        """Whether a run ended here."""
        return self.summary.is_file()

    def check(self, recipe: "Recipe", *, resume: bool) -> Path | None:
        """Find out whether the run may use the folder, without touching it.

        Returns:
            The checkpoint to go on from, or None to start afresh.

        Raises:
            UserError: the folder holds another run, or something else, or cannot be written.
        """
        if not self.path.exists():
            self._check_writable()
            return None
        if not self.path.is_dir():
            raise UserError("the run folder is to be made here, and there is a file", where=f"output_dir: {self.path}")
        if not any(self.path.iterdir()):
            return None
        is_run = (self.path / RECIPE).is_file()
        if not resume or not is_run:
            what = "the folder already holds another run" if is_run else "the folder already holds other files"
            hint = "Go on with `--resume`, or" if is_run else "Name an empty folder, or"
            raise UserError(what, where=f"output_dir: {self.path}", hint=f"{hint} give another `--set output_dir=…`.")
        self._check_same(recipe)
        checkpoint = latest_complete(self.checkpoints)
        if checkpoint is None and self.is_finished:
            raise UserError(
                "the run is finished, and left no checkpoint to go on from",
                where=f"output_dir: {self.path}",
                hint="Start a new run in another folder.",
            )
        return checkpoint

    def claim(self, recipe: "Recipe") -> None:
        """Make the folder this run's."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.path / RECIPE, dump_recipe(recipe))
        remove_incomplete(self.checkpoints)

    def release(self) -> None:
        """Take back what libraries made of the folder before the run claimed it: empty folders."""
        for folder in (self.checkpoints, self.path):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    @contextmanager
    def finished_model(self) -> Iterator[Path]:
        """A temporary folder for the finished model's files, which move into the run folder when all are written."""
        temporary = self.path / ".model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            yield temporary
            for file in sorted(temporary.glob("*")):
                if (self.path / file.name).is_dir():
                    shutil.rmtree(self.path / file.name)
                file.replace(self.path / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _check_writable(self) -> None:
        """Try the nearest folder that exists."""
        import os

        parent = next(folder for folder in self.path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"nothing can be written into {parent}", where=f"output_dir: {self.path}")

    def _check_same(self, recipe: "Recipe") -> None:
        """Refuse to continue a run by another recipe."""
        before = load_recipe(self.path / RECIPE, to_train=False).recipe
        old, new = (_bound(one.model_dump(mode="json")) for one in (before, _absolute(recipe)))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"the run was started with {key}: {old.get(key)}, and now it is {new.get(key)}",
                    where=str(self.path / RECIPE),
                    hint="Continue with the same value, or start a new run in another folder.",
                )


def _absolute(recipe: "Recipe") -> "Recipe":
    """The recipe as it reads after being saved, with absolute paths."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / RECIPE
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        return load_recipe(file, to_train=False).recipe


def _bound(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that a continuation must not change, flattened to `section.key`."""
    flat: dict[str, Any] = {"method": values["method"]}
    for section, held in values.items():
        if isinstance(held, dict):
            flat |= {f"{section}.{key}": value for key, value in held.items() if key not in _FREE.get(section, set())}
    training = values["training"]
    # How a step is cut into forward passes does not matter to it; how many rows it takes does.
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    if training["rows_per_step"] is None:
        flat["training: rows of a process in a step"] = rows
    return flat
