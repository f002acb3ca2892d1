"""From package names and folders to the Python files worth reading; nothing is imported."""

import importlib.machinery
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftchat.errors import UserError

MAX_BYTES = 1_000_000
_VENDORED = frozenset(
    {
        "vendor",
        "_vendor",
        "vendored",
        "_vendored",
        "third_party",
        "thirdparty",
        "extern",
        "site-packages",
        "node_modules",
    }
)
_TESTS = frozenset({"test", "tests", "idle_test"})
_NOT_SOURCE = frozenset({"__pycache__", "build", "dist", "venv", "env"})
_TEST_FILE = re.compile(r"(test_.*|.*_test|tests|conftest)\.py")
_GENERATED_FILE = re.compile(r".*_pb2(_grpc)?\.py|_version\.py")
_GENERATED_HEADER = re.compile(
    r"^\s*#.*(@generated|auto-?generated|generated (by|from|with|automatically)|do not (edit|modify))", re.I | re.M
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Python file and the dotted name of its module."""

    path: Path
    module: str


def locate(roots: Sequence[str], skipped: Counter[str]) -> list[SourceFile]:
    """The Python files of each root, sorted by module; reasons for those left out are added to `skipped`.

    Args:
        roots: importable package or module names, folders, or single `.py` files.
        skipped: counts by reason, in files or folders.

    Raises:
        InputError: a root is neither a package of this environment nor a folder, or has no Python source.
    """
    found: dict[Path, SourceFile] = {}
    for root in roots:
        before = len(found)
        for file in _root_files(root, skipped):
            found.setdefault(file.path, file)
        if len(found) == before and not any(_inside(root, file.path) for file in found.values()):
            raise UserError(
                "holds no Python file to read", where=root, cure="Name a package or a folder with .py files."
            )
    return sorted(found.values(), key=lambda file: file.module)


def _inside(root: str, path: Path) -> bool:
    return Path(root).exists() and path.is_relative_to(Path(root).resolve())


def _root_files(root: str, skipped: Counter[str]) -> Iterator[SourceFile]:
    path = Path(root).expanduser()
    looks_like_path = os.sep in root or root.endswith(".py") or root in {".", ".."}
    if not looks_like_path and (place := _find_module(root)) is not None:
        if place.is_dir():
            yield from _walk(place, root, skipped)
        else:
            yield SourceFile(place, root)
    elif path.is_dir():
        yield from _walk(path.resolve(), None, skipped)
    elif path.is_file() and path.suffix == ".py":
        yield SourceFile(path.resolve(), _module_name(path.resolve()))
    else:
        raise UserError(
            "no package of this Python and no folder has this name",
            where=root,
            cure="Install the package into this environment, or give the folder of its source.",
        )


def _find_module(dotted: str) -> Path | None:
    """The folder of a package or the file of a module. Only the outermost name goes through the import system:
    `find_spec` of a dotted name would import (and so run) its parents."""
    if not all(part.isidentifier() for part in dotted.split(".")):
        return None
    top, *inner = dotted.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is not None and spec.origin == "frozen":  # built into the interpreter, with its source beside the others
        spec = importlib.machinery.PathFinder.find_spec(top)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(part, list(spec.submodule_search_locations))
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError("is compiled, not Python source", where=dotted, cure="Name a package written in Python.")
    return Path(spec.origin).resolve()


def _walk(top: Path, package: str | None, skipped: Counter[str]) -> Iterator[SourceFile]:
    for folder, names, files in os.walk(top):
        names[:] = sorted(name for name in names if not _skip_folder(Path(folder, name), skipped))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix != ".py" or name == "setup.py":
                continue
            if reason := _skip_file(path):
                skipped[reason] += 1
                continue
            yield SourceFile(path, _dotted(package, path.relative_to(top)) if package else _module_name(path))


def _skip_folder(path: Path, skipped: Counter[str]) -> bool:
    if path.name in _VENDORED:
        skipped["vendored folders"] += 1
    elif path.name in _TESTS:
        skipped["test folders"] += 1
    else:
        return path.name.startswith(".") or path.name in _NOT_SOURCE or (path / "pyvenv.cfg").exists()
    return True


def _skip_file(path: Path) -> str | None:
    if _TEST_FILE.fullmatch(path.name):
        return "test files"
    if path.stat().st_size > MAX_BYTES:
        return "files over 1 MB"
    with path.open("rb") as file:
        head = file.read(1000).decode("utf-8", errors="replace")
    if _GENERATED_FILE.fullmatch(path.name) or _GENERATED_HEADER.search(head):
        return "generated files"
    return None


def _dotted(package: str, relative: Path) -> str:
    parts = [*package.split("."), *relative.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_name(path: Path) -> str:
    """The name a file is imported by: as many folders upwards as are packages."""
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts)
