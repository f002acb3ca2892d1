"""The recipes that are installed with the package: listed, and found by name where no such folder is."""

from dataclasses import dataclass
from pathlib import Path

from peftchat.shipped_files import shipped_file

_FOLDER = "recipes"
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that came with the package.

    Attributes:
        name: its file name without the suffix.
        path: its file.
        summary: the first sentence of the comment at its top.
    """

    name: str
    path: Path
    summary: str


def shipped_recipes() -> list[ShippedRecipe]:
    """Return the recipes that came with the package, by name."""
    folder = shipped_file(_FOLDER)
    if folder is None:
        return []
    return [
        ShippedRecipe(path.stem, path, _summary(path.read_text(encoding="utf-8")))
        for path in sorted(folder.iterdir())
        if path.suffix in _SUFFIXES
    ]


def find_shipped_recipe(path: Path) -> Path | None:
    """Return the shipped recipe that a path asks for, or None.

    Args:
        path: `NAME.yaml`, `recipes/NAME.yaml` or `NAME`. A path with other folders names a file of the user's.
    """
    folders = path.parent.parts
    if folders not in ((), (_FOLDER,)) or path.suffix not in ("", *_SUFFIXES):
        return None
    return next((recipe.path for recipe in shipped_recipes() if recipe.name == path.stem), None)


def _summary(text: str) -> str:
    """Return the first sentence of the comment at the top, which follows the line that runs the recipe."""
    comment = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    prose = " ".join(line for line in comment if line and not line.startswith(("yaml-language-server", "peftchat ")))
    return prose.partition(". ")[0].rstrip(".")
