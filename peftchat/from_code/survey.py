"""Survey of Python source: find and read the files, without importing them."""

import ast
import importlib.machinery
import importlib.util
import math
import os
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftchat.errors import UserError
from peftchat.from_code.inventory import UNPARSABLE, CodeObject, Kind, code_objects, exported, is_private, top_level

MAX_BYTES = 1_000_000
"""Most bytes of a file; larger files are usually generated."""

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
    """A Python file and the dotted name of its module."""

    path: Path
    module: str


def find_files(roots: Sequence[str], skipped: Counter[str]) -> list[SourceFile]:
    """Return the Python files of each root, sorted by module.

    Args:
        roots: importable package or module names, folders, or single `.py` files.
        skipped: counts of skipped files and folders by reason; updated in place.

    Raises:
        UserError: a root is neither a package of this environment nor a folder, or has no Python source.
    """
    found: dict[Path, SourceFile] = {}
    for root in roots:
        before = len(found)
        for file in _root_files(root, skipped):
            found.setdefault(file.path, file)
        if len(found) == before and not any(_inside(root, file.path) for file in found.values()):
            raise UserError(
                "holds no Python file to read", where=root, hint="Name a package or a folder with .py files."
            )
    return sorted(found.values(), key=lambda file: file.module)


def _inside(root: str, path: Path) -> bool:
    return Path(root).exists() and path.is_relative_to(Path(root).resolve())


def _root_files(root: str, skipped: Counter[str]) -> Iterator[SourceFile]:
    path = Path(root)
    looks_like_path = os.sep in root or root.endswith(".py") or root in {".", ".."}
    if not looks_like_path and (location := _find_module(root)) is not None:
        if location.is_dir():
            yield from _walk(location, root, skipped)
        else:
            yield SourceFile(location, root)
    elif path.is_dir():
        yield from _walk(path.resolve(), None, skipped)
    elif path.is_file() and path.suffix == ".py":
        yield SourceFile(path.resolve(), _module_name(path.resolve()))
    else:
        raise UserError(
            "no package of this Python and no folder has this name",
            where=root,
            hint="Install the package into this environment, or give the folder of its source.",
        )


def _find_module(dotted: str) -> Path | None:
    """Return the folder of a package or the file of a module.

    Only the outermost name goes through the import system: `find_spec` of a dotted name would import its parents.
    """
    if not all(part.isidentifier() for part in dotted.split(".")):
        return None
    top, *inner = dotted.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is not None and spec.origin == "frozen":  # part of the interpreter, but its source is on the path too
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
        raise UserError("is compiled, not Python source", where=dotted, hint="Name a package written in Python.")
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
            yield SourceFile(path, _dotted_name(package, path.relative_to(top)) if package else _module_name(path))


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


def _dotted_name(package: str, relative: Path) -> str:
    parts = [*package.split("."), *relative.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_name(path: Path) -> str:
    """Return the name that a file is imported by, with its parent packages."""
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts)


_SECRET_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        r"\bgh[pousr]_[A-Za-z0-9]{20,}\b",
        r"\bgithub_pat_\w{20,}\b",
        r"\bglpat-[\w-]{20,}",
        r"\bsk-[A-Za-z0-9_-]{16,}",
        r"\bhf_[A-Za-z0-9]{20,}\b",
        r"\bxox[abprs]-[\w-]{10,}",
        r"\bAIza[\w-]{30,}",
        r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}",
        r"\b[a-z][a-z0-9+.-]*://[^/\s:@'\"{}<>]+:[^/\s:@'\"{}<>]{3,}@",
        r"(?i)\w*(?:passw(?:or)?d|passphrase|secret|api_?key|access_?key|auth_?token|private_?key|token)\w*"
        r"['\"]?\s*(?::\s*[\w.\[\]| ]+)?(?:=|:)\s*[rbfu]?['\"](?=[^'\"\s{}<>]*[0-9!@#$%^&*])[^'\"\s{}<>]{6,}['\"]",
    )
)
_LONG_LITERAL = re.compile(r"['\"]([A-Za-z0-9+/=_-]{32,})['\"]")
_MIN_KEY_ENTROPY = 4.0
"""Bits of entropy per character: 32 random base64 characters have about 4.5, English identifiers about 3.5."""


def has_secret(text: str) -> bool:
    """Return whether a text contains what looks like a key, token or password."""
    if any(pattern.search(text) for pattern in _SECRET_PATTERNS):
        return True
    return any(_looks_random(match[1]) for match in _LONG_LITERAL.finditer(text))


def _looks_random(text: str) -> bool:
    if not (re.search(r"\d", text) and re.search(r"[A-Za-z]", text)):
        return False
    if re.fullmatch(r"[0-9a-fA-F]+", text):
        return True
    return _entropy(text) > _MIN_KEY_ENTROPY and bool(re.search(r"[A-Z]", text) and re.search(r"[a-z]", text))


def _entropy(text: str) -> float:
    """Return the Shannon entropy in bits per character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


STDLIB = (
    "abc", "argparse", "base64", "bisect", "calendar", "cmd", "collections", "colorsys", "concurrent.futures",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "enum", "filecmp", "fileinput", "fnmatch",
    "fractions", "functools", "getpass", "gettext", "glob", "graphlib", "gzip", "heapq", "html", "inspect",
    "ipaddress", "json", "keyword", "linecache", "locale", "logging", "mimetypes", "numbers", "operator", "pathlib",
    "pkgutil", "pprint", "queue", "random", "reprlib", "sched", "secrets", "shelve", "shlex", "shutil", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types",
    "urllib.parse", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip
"""Modules of the standard library that make good examples; some Python versions lack a few."""


def available_stdlib() -> list[str]:
    """Return the modules of `STDLIB` that this Python has."""
    tops = {name: name.split(".")[0] for name in STDLIB}
    return [name for name, top in tops.items() if importlib.util.find_spec(top) is not None]


@dataclass(frozen=True, slots=True)
class Survey:
    """The objects of the surveyed code.

    Attributes:
        objects: in the order of modules and lines, each full name once.
        locations: `file:line` by full name.
        siblings: the public top-level names of each module.
        files: the number of files read.
        skipped: counts by reason.
        unreadable: `file: reason` for each file that is not valid Python.
    """

    objects: tuple[CodeObject, ...]
    locations: dict[str, str]
    siblings: dict[str, frozenset[str]]
    files: int
    skipped: Counter[str]
    unreadable: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Module:
    file: SourceFile
    text: str
    tree: ast.Module
    names: tuple[str, ...] | None = field(default=None)

    @property
    def is_package(self) -> bool:
        return self.file.path.name == "__init__.py"


def survey(roots: Sequence[str], *, private: bool = False) -> Survey:
    """Read every Python file of the roots without importing or running it.

    Args:
        roots: package names, folders or files.
        private: whether to include names that start with an underscore.

    Raises:
        UserError: a root does not exist or has no Python source.
    """
    skipped: Counter[str] = Counter()
    modules, unreadable = _read(find_files(roots, skipped))
    skipped["files that are not valid Python"] += len(unreadable)
    reexports = _reexports(modules)
    found: dict[str, CodeObject] = {}
    locations: dict[str, str] = {}
    members: dict[str, list[tuple[Kind, str]]] = {}
    for module in modules:
        hidden_module = _is_hidden(module.file.module) and not private
        for name, node in top_level(module.tree).items():
            reexporter = reexports.get((module.file.module, name))
            if reexporter is None and (hidden_module or not (private or _is_public(name, module.names))):
                skipped["private names"] += 1
                continue
            for item in code_objects(node, module.text, reexporter or module.file.module, private=private):
                if has_secret(item.quotable):
                    skipped["classes with a secret" if item.kind == "class" else "functions with a secret"] += 1
                elif item.kind in {"method", "property"} and not item.docstring:
                    skipped["methods without a docstring"] += 1
                elif item.full_name not in found:
                    found[item.full_name] = item
                    locations[item.full_name] = f"{module.file.path}:{item.line}"
                    if item.docstring and "." not in item.name:
                        members.setdefault(item.module, []).append((item.kind, item.name))
    siblings = {name: frozenset(item for _, item in own) for name, own in members.items()}
    overviews = {}
    for module in modules:
        overview = _overview(module, tuple(members.get(module.file.module, ())))
        if _is_hidden(overview.module) and not private:
            continue
        if has_secret(overview.docstring or ""):
            skipped["modules with a secret in the docstring"] += 1
            continue
        overviews[overview.module] = overview
        locations.setdefault(overview.module, f"{module.file.path}:1")
    objects = sorted([*found.values(), *overviews.values()], key=lambda item: (item.module, item.line, item.name))
    # A package may define a function with the name of one of its modules; only one object per name is kept.
    unique = {item.full_name: item for item in objects}
    return Survey(tuple(unique.values()), locations, siblings, len(modules), +skipped, tuple(unreadable))


def _read(files: list[SourceFile]) -> tuple[list[_Module], list[str]]:
    modules, unreadable = [], []
    for file in files:
        if file.module.rpartition(".")[2] == "__main__":
            continue
        try:
            with tokenize.open(file.path) as opened:  # honors the file's coding line
                text = opened.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user's strings may have invalid escapes
                tree = ast.parse(text, file.path.name)
        except UNPARSABLE as error:
            unreadable.append(f"{file.path}: {str(error) or 'nested too deep'}")
            continue
        modules.append(_Module(file, text, tree, exported(tree)))
    return modules, unreadable


def _reexports(modules: list[_Module]) -> dict[tuple[str, str], str]:
    """Return the outermost package that re-exports each name.

    Returns:
        A package by defining module and name. A package re-exports a name that its `__init__` imports or lists.
    """
    by_name = {module.file.module: module for module in modules}
    reexports: dict[tuple[str, str], str] = {}
    packages = sorted(
        (module for module in modules if module.is_package), key=lambda module: module.file.module.count(".")
    )
    for package in packages:
        for node in package.tree.body:
            if not isinstance(node, ast.ImportFrom) or (node.level == 0 and node.module is None):
                continue
            base = ".".join(package.file.module.split(".")[: len(package.file.module.split(".")) - node.level + 1])
            origin = node.module or "" if node.level == 0 else ".".join(filter(None, [base, node.module]))
            if origin not in by_name:
                continue
            for alias in node.names:
                names = _public_names(by_name[origin]) if alias.name == "*" else [alias.name]
                for name in names:
                    if alias.asname in (None, alias.name) and _is_public(name, package.names):
                        reexports.setdefault((origin, name), package.file.module)
        # Names in `__all__` without a definition or import are loaded from a submodule on first use.
        for name in set(package.names or ()) - set(top_level(package.tree)):
            for origin in by_name:
                if origin.startswith(f"{package.file.module}.") and name in _public_names(by_name[origin]):
                    reexports.setdefault((origin, name), package.file.module)
    return reexports


def _public_names(module: _Module) -> list[str]:
    return [name for name in top_level(module.tree) if _is_public(name, module.names)]


def _is_public(name: str, names: tuple[str, ...] | None) -> bool:
    return name in names if names else not is_private(name)


def _is_hidden(module: str) -> bool:
    return any(is_private(part) for part in module.split("."))


def _overview(module: _Module, members: tuple[tuple[Kind, str], ...]) -> CodeObject:
    return CodeObject(
        "module", module.file.module, "", 0, ast.get_docstring(module.tree), None, "", module.tree, members=members
    )
