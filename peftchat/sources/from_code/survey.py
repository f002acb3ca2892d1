"""Reads the files of some packages and lists what users can ask about, under the names users import."""

import ast
import tokenize
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftchat.sources.from_code.inventory import CodeObject, Kind, build, exported, is_private, top_level
from peftchat.sources.from_code.leaks import has_secret
from peftchat.sources.from_code.locate import SourceFile, locate


@dataclass(frozen=True, slots=True)
class Survey:
    """The objects found, where each lies, and everything that was left out.

    Attributes:
        objects: in the order of modules and lines, each full name once.
        places: full name -> `file:line`.
        siblings: module -> its public top-level names.
        files: how many files were read.
        skipped: reason -> count.
        unreadable: `file: reason` for each file that is not valid Python.
    """

    objects: tuple[CodeObject, ...]
    places: dict[str, str]
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
    """Read every Python file of the roots; nothing is imported and nothing runs.

    Args:
        roots: package names, folders or files.
        private: ask also about names that start with an underscore.

    Raises:
        InputError: a root does not exist or has no Python source.
    """
    skipped: Counter[str] = Counter()
    modules, unreadable = _read(locate(roots, skipped))
    skipped["files that are not valid Python"] += len(unreadable)
    homes = _public_homes(modules)
    found: dict[str, CodeObject] = {}
    places: dict[str, str] = {}
    members: dict[str, list[tuple[Kind, str]]] = {}
    for module in modules:
        hidden_module = _is_hidden(module.file.module) and not private
        for name, node in top_level(module.tree).items():
            home = homes.get((module.file.module, name))
            if home is None and (hidden_module or not (private or _is_public(name, module.names))):
                skipped["private names"] += 1
                continue
            for item in build(node, module.text, home or module.file.module, private=private):
                if has_secret(item.quotable):
                    skipped["classes with a secret" if item.kind == "class" else "functions with a secret"] += 1
                elif item.kind in {"method", "property"} and not item.docstring:
                    skipped["methods without a docstring"] += 1
                elif item.full_name not in found:
                    found[item.full_name] = item
                    places[item.full_name] = f"{module.file.path}:{item.line}"
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
        places.setdefault(overview.module, f"{module.file.path}:1")
    objects = sorted([*found.values(), *overviews.values()], key=lambda item: (item.module, item.line, item.name))
    # A package may define a function of the same name as one of its modules: one object a name.
    unique = {item.full_name: item for item in objects}
    return Survey(tuple(unique.values()), places, siblings, len(modules), +skipped, tuple(unreadable))


def _read(files: list[SourceFile]) -> tuple[list[_Module], list[str]]:
    modules, unreadable = [], []
    for file in files:
        if file.module.rpartition(".")[2] == "__main__":
            continue
        try:
            with tokenize.open(file.path) as opened:  # honours the file's coding line
                text = opened.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the user's strings are not our news
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError) as error:
            unreadable.append(f"{file.path}: {error}")
            continue
        modules.append(_Module(file, text, tree, exported(tree)))
    return modules, unreadable


def _public_homes(modules: list[_Module]) -> dict[tuple[str, str], str]:
    """(defining module, name) -> the outermost package that offers the name in its `__init__`."""
    by_name = {module.file.module: module for module in modules}
    homes: dict[tuple[str, str], str] = {}
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
                names = _offered(by_name[origin]) if alias.name == "*" else [alias.name]
                for name in names:
                    if alias.asname in (None, alias.name) and _is_public(name, package.names):
                        homes.setdefault((origin, name), package.file.module)
        # Names offered but not defined or imported by a statement are loaded on first use from a submodule.
        for name in set(package.names or ()) - set(top_level(package.tree)):
            for origin in by_name:
                if origin.startswith(f"{package.file.module}.") and name in _offered(by_name[origin]):
                    homes.setdefault((origin, name), package.file.module)
    return homes


def _offered(module: _Module) -> list[str]:
    return [name for name in top_level(module.tree) if _is_public(name, module.names)]


def _is_public(name: str, names: tuple[str, ...] | None) -> bool:
    return name in names if names else not is_private(name)


def _is_hidden(module: str) -> bool:
    return any(is_private(part) for part in module.split("."))


def _overview(module: _Module, members: tuple[tuple[Kind, str], ...]) -> CodeObject:
    return CodeObject(
        "module", module.file.module, "", 0, ast.get_docstring(module.tree), None, "", module.tree, members=members
    )
