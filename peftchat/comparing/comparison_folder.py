"""The folder of a comparison: what lies where, and that it stays one comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.recipe import dump_recipe, load_recipe
from peftchat.recipe.document import parse_yaml, to_plain

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


class ComparisonFolder:
    """One comparison's folder.

    Args:
        path: `comparison.json`, `report.html`, `recommended.yaml`, and below them `data/`, `recipes/`, `runs/`,
            `logs/`, `measured/`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path / "recipe.yaml"
        self.data = path / "data"
        self.result = path / "comparison.json"
        self.report = path / "report.html"
        self.recommended = path / "recommended.yaml"

    def recipe(self, name: str) -> Path:
        """The recipe of a run."""
        return self.path / "recipes" / f"{name}.yaml"

    def run(self, name: str) -> Path:
        """The run folder of a run."""
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        """What a run said."""
        return self.path / "logs" / f"{name}.txt"

    def measured(self, name: str) -> Path:
        """What was measured of a run afterwards."""
        return self.path / "measured" / f"{name}.json"

    @contextmanager
    def claimed(self, recipe: "Recipe") -> Iterator[None]:
        """Make the folder this comparison's, and keep a second start out of it meanwhile.

        Raises:
            UserError: it holds something else, a comparison by another recipe, or one that is going on.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError("the folder is to be made here, and there is a file", where=f"--output {self.path}")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.base.is_file():
            hint = "Name an empty folder."
            raise UserError("the folder already holds other files", where=f"--output {self.path}", hint=hint)
        text = dump_recipe(recipe)
        if self.base.is_file():
            _check_same(self.base, text)
        for name in ("recipes", "runs", "logs", "measured"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError("another comparison is going on there", where=f"--output {self.path}") from error
        try:
            write_text(self.base, text)
            yield
        finally:
            lock.release()

    def check_unchanged(self, file: Path, text: str, run: Path) -> None:
        """Refuse to take a run that lies in the folder for one that would be trained differently now.

        Args:
            file: the recipe that the run was started with, if it was.
            text: its recipe now.

        Raises:
            UserError: naming the key that changed.
        """
        if file.is_file() and run.is_dir():
            _check_same(file, text)


def _check_same(file: Path, text: str) -> None:
    # Read and written again, it has the keys that recipes have come to have since.
    before = dump_recipe(load_recipe(file, to_train=False).recipe)
    old, new = _flat(before), _flat(text)
    for key in sorted(old.keys() | new.keys()):
        if key != "output_dir" and old.get(key) != new.get(key):
            raise UserError(
                f"the comparison was started with {key}: {old.get(key)}, and now it is {new.get(key)}",
                where=str(file),
                hint="Go on with the same value, or start another comparison with -o.",
            )


def _flat(text: str) -> dict[str, Any]:
    """The values of a recipe's YAML by dotted key."""
    values, _ = to_plain(parse_yaml(text, "recipe"), "recipe")
    flat: dict[str, Any] = {}
    for section, held in values.items():
        flat |= (
            {f"{section}.{key}": value for key, value in held.items()} if isinstance(held, dict) else {section: held}
        )
    return flat
