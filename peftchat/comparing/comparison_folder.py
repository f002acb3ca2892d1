"""Folder of a comparison: its files, its lock and the check of its recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.recipe import dump_recipe, load_recipe
from peftchat.recipe.document import flat_values

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


_FOLDERS = ("recipes", "runs", "logs", "evaluations")
_LOCK = ".lock"


class ComparisonFolder:
    """The folder of one comparison.

    Attributes:
        path: the folder.
        base: the recipe that all candidates share.
        data: the conversations of every run, one file per split.
        summary: `comparison.json`.
        report: the HTML report.
        recommended: the recommended recipe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path / "recipe.yaml"
        self.data = path / "data"
        self.summary = path / "comparison.json"
        self.report = path / "report.html"
        self.recommended = path / "recommended.yaml"

    @property
    def is_comparison(self) -> bool:
        """Whether a comparison has begun here, so that its files may be replaced; a run's folder is none."""
        if not self.path.is_dir():
            return False
        folders = [self.path / name for name in _FOLDERS if (self.path / name).is_dir()]
        if self.base.is_file():
            return len(folders) == len(_FOLDERS)
        # It was interrupted before it wrote its recipe.
        others = {entry.name for entry in self.path.iterdir()} - {*_FOLDERS, _LOCK}
        return not others and not any(any(folder.iterdir()) for folder in folders)

    def recipe(self, name: str) -> Path:
        """Return the recipe file of a run."""
        return self.path / "recipes" / f"{name}.yaml"

    def run(self, name: str) -> Path:
        """Return the run folder of a run."""
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        """Return the file with the output of a child process."""
        return self.path / "logs" / f"{name}.txt"

    def evaluation(self, name: str) -> Path:
        """Return the file with the evaluation of a run."""
        return self.path / "evaluations" / f"{name}.json"

    @property
    def answers(self) -> Path:
        """The folder with the answers to tasks as they came."""
        return self.path / "evaluations" / "answers"

    @contextmanager
    def locked(self, recipe: "Recipe") -> Iterator[None]:
        """Create the folder and lock it against a second process.

        Args:
            recipe: the recipe that all candidates share.

        Raises:
            UserError: it holds other files, a comparison of another recipe, or a comparison that is running.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError("expected a folder, got a file", where=f"-o {self.path}")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.is_comparison:
            hint = "Choose an empty folder."
            raise UserError("the folder already holds other files", where=f"-o {self.path}", hint=hint)
        text = dump_recipe(recipe)
        if self.base.is_file():
            _check_same(self.base, text)
        for name in _FOLDERS:
            (self.path / name).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            hint = "Wait until it ends, or choose another folder."
            raise UserError("another comparison runs in this folder", where=f"-o {self.path}", hint=hint) from error
        try:
            write_text(self.base, text)
            yield
        finally:
            lock.release()

    def check_unchanged(self, file: Path, text: str, run: Path) -> None:
        """Check that a run already in the folder was trained with the recipe it has now.

        Args:
            file: the recipe that the run was started with, if it was.
            text: its recipe now.
            run: its run folder.

        Raises:
            UserError: a key changed.
        """
        if file.is_file() and run.is_dir():
            _check_same(file, text)


_FREE = ("output_dir", "training.eval_on_start")
"""Keys that do not change what a run becomes."""


def _check_same(file: Path, text: str) -> None:
    # Loading and dumping adds keys that are newer than the file.
    before = dump_recipe(load_recipe(file, to_train=False, upgrade=True).recipe)
    old, new = flat_values(before), flat_values(text)
    for key in sorted(old.keys() | new.keys()):
        if key not in _FREE and old.get(key) != new.get(key):
            raise UserError(
                f"the comparison was started with {key}: {old.get(key)}, and it is {new.get(key)} now",
                where=str(file),
                hint="Use the same value, or start another comparison with -o.",
            )
