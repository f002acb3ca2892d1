"""Which values of a recipe are local paths, and where they lead."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftchat.recipe.document import Document, Keys

LOCAL_MARKS = ("/", "./", "../", "~")
"""Beginnings that no hub id has."""


def path_keys(values: dict[str, Any]) -> Iterator[Keys]:
    """The keys in `values` that can hold a local path, whether or not they do; `output_dir` aside."""
    if isinstance(values.get("model"), dict):
        yield ("model", "name")
    if isinstance(values.get("distributed"), dict):
        yield ("distributed", "deepspeed_config")
    data = values.get("data")
    for kind in ("train", "eval"):
        entries = data.get(kind) if isinstance(data, dict) else None
        for at, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                yield ("data", kind, at, "path")


def _holder(values: dict[str, Any], keys: Keys) -> dict[str, Any]:
    holder: Any = values
    for key in keys[:-1]:
        holder = holder[key]
    found: dict[str, Any] = holder
    return found


def find_beside_recipe(document: Document) -> None:
    """Paths are relative to the current folder; one that is not there, but is beside its recipe, becomes that."""
    for keys in path_keys(document.values):
        holder, key = _holder(document.values, keys), str(keys[-1])
        value, file = holder.get(key), document.place(keys).file
        if not isinstance(value, str) or not value or file is None or exists(value):
            continue
        if exists(str(beside := file.parent / value)):
            holder[key] = str(beside)


def make_absolute(values: dict[str, Any]) -> None:
    """Replace local paths in the plain values of a recipe by absolute ones; hub ids stay."""
    for keys in path_keys(values):
        holder, key = _holder(values, keys), str(keys[-1])
        value = holder.get(key)
        if isinstance(value, str) and (value.startswith(LOCAL_MARKS) or exists(value)):
            holder[key] = str(Path(value).expanduser().absolute())
    values["output_dir"] = str(Path(values["output_dir"]).expanduser().absolute())


def exists(value: str) -> bool:
    """Whether `value` is the path of something here; a text that cannot be a path is not."""
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
