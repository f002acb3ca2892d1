"""Loading a recipe: its file, the recipes it extends, flags, types and combinations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftchat.errors import UserError
from peftchat.output_paths import InputPath
from peftchat.paths import expand_path
from peftchat.recipe.begun_at_run import changes_of_run, recipe_of_run, take_from_run
from peftchat.recipe.deepspeed_file import deepspeed_problems
from peftchat.recipe.document import (
    Document,
    Keys,
    apply_override,
    expand_paths,
    find_beside_recipe,
    merge_recipes,
    parse_yaml,
    path_keys,
    to_plain,
)
from peftchat.recipe.error_messages import FORMER_KEYS, FORMER_SOURCE_KEYS, FORMER_VALUES, refuse, schema_problems
from peftchat.recipe.schema import Recipe, drop_options_of_other_objectives, drop_settings_of_other_variants
from peftchat.recipe.validation import (
    conflict_problems,
    find_conflicts,
    invalid_combinations,
    missing_dependencies,
    recipe_values,
    resolve_defaults,
)

DATA_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst")
"""Endings of files of conversations, which no recipe has."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and where each of its keys was written."""

    recipe: Recipe
    path: Path
    document: Document
    overrides: tuple[str, ...] = ()

    def where(self, *keys: str | int) -> str:
        """The place of a key, for an error about it: `file:line: a.b.c` or `--set a.b.c`."""
        return self.document.place(keys).of(keys)

    def arguments(self, **changes: str) -> list[str]:
        """Return what names this recipe on a command line: its file, and `--set` for every override.

        Args:
            changes: overrides that take the place of those of the same key, with `__` for each dot.
        """
        new = {key.replace("__", "."): value for key, value in changes.items()}
        kept = [flag for flag in self.overrides if flag.partition("=")[0].strip() not in new]
        flags = [*kept, *(f"{key}={value}" for key, value in new.items())]
        return [str(self.path), *(part for flag in flags for part in ("--set", flag))]

    def inputs(self) -> list[InputPath]:
        """Return every file and folder that the recipe names, and the recipe's own files."""
        recipe = self.recipe
        files = {place.file for place in self.document.places.values() if place.file is not None}
        found = [InputPath(file, "the recipe") for file in sorted({self.path, *files})]
        found.append(InputPath(Path(recipe.model.name), "the base model"))
        if recipe.model.adapter is not None:
            found.append(InputPath(Path(recipe.model.adapter), "the run that it begins at"))
        for entry in (*recipe.data.train, *(recipe.data.eval or ())):
            found.append(InputPath(Path(entry.path), "the data", is_read_recursively=True))
        if isinstance(recipe.evaluation.questions, str):
            found.append(InputPath(Path(recipe.evaluation.questions), "the file of questions"))
        if recipe.distributed.deepspeed_config is not None:
            found.append(InputPath(Path(recipe.distributed.deepspeed_config), "the DeepSpeed file"))
        return found


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, to_train: bool = True, upgrade: bool = False
) -> LoadedRecipe:
    """Read, complete and check the recipe at `path`.

    Args:
        path: the YAML file.
        overrides: `section.key=YAML` texts, later ones on top.
        to_train: also check that this machine has what training needs. Off for commands that only read the
            recipe of a finished run.
        upgrade: accept keys and values of older versions, which the recipes of old runs have.

    Raises:
        UserError: the recipe cannot be used; the message lists every problem.
    """
    document = _read(Path(path), ())
    if upgrade:
        _upgrade(document)
    for flag in overrides:
        apply_override(document, flag)
    expand_paths(document)
    find_beside_recipe(document)
    drop_settings_of_other_variants(document)
    drop_options_of_other_objectives(document)
    run = _take_from_run(document, needed=to_train)
    recipe = _validate_without_conflicts(document, str(path))
    problems = list(invalid_combinations(recipe))
    if run is not None:
        problems += changes_of_run(recipe, run)
    if to_train:
        problems += [*missing_dependencies(recipe), *deepspeed_problems(recipe)]
    refuse(problems, document, str(path))
    return LoadedRecipe(recipe, Path(path), document, tuple(overrides))


def _take_from_run(document: Document, *, needed: bool) -> Recipe | None:
    """Fill in what the run determines that the recipe begins at, and return that run's recipe; None without one."""
    file = recipe_of_run(document, needed=needed)
    if file is None:
        return None
    run = load_recipe(file, to_train=False, upgrade=True).recipe
    take_from_run(document, run, recipe_values(run), file)
    return run


def _read(path: Path, extending: tuple[Path, ...]) -> Document:
    """Return the document at `path`, merged over the recipes it extends."""
    name = str(path)
    if name.endswith(DATA_SUFFIXES) and path.is_file():
        hint = f"`peftchat init --data {name}` writes a recipe that trains on it."
        raise UserError("is a file of conversations, not a recipe", where=name, hint=hint)
    text = read_text(path, "a recipe", "`peftchat init` writes a recipe to start from.")
    values, places = to_plain(parse_yaml(text, name), name, file=path, layer=-len(extending))
    if values is None:
        raise UserError("the recipe is empty", where=name, hint="`peftchat init` writes one to start from.")
    if not isinstance(values, dict):
        raise UserError(
            "a recipe is keys with values",
            where=name,
            hint="Begin with keys such as `model:` and `method:`; `peftchat init` writes one to start from.",
        )
    document = Document(values, places)
    base = document.values.pop("extends", None)
    if base is None:
        return document
    where = document.place(("extends",)).of(("extends",))
    if not isinstance(base, str):
        raise UserError("expected the path of one recipe", where=where)
    target = path.parent / expand_path(base, where)
    chain = (*extending, path.resolve())
    if target.resolve() in chain:
        raise UserError(f"`{base}` extends this recipe in turn", where=where, hint="Break the circle.")
    if not target.exists():
        raise UserError(f"`{base}` does not exist", where=where, hint=f"The path is taken from {path.parent or '.'}.")
    return merge_recipes(_read(target, chain), document)


def _upgrade(document: Document) -> None:
    """Replace keys and values of older versions by today's."""
    for (section, former), key in FORMER_KEYS.items():
        _rename(document, (section,), former, key)
    for keys in path_keys(document.values):
        if keys[0] == "data":
            for former, key in FORMER_SOURCE_KEYS.items():
                _rename(document, keys[:-1], former, key)
    for keys, values in FORMER_VALUES.items():
        if (value := document.value(keys)) in values:
            document.value(keys[:-1])[keys[-1]] = values[value]


def _rename(document: Document, parent: Keys, former: str, key: str) -> None:
    holder: Any = document.values
    for step in parent:
        try:
            holder = holder[step]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(holder, dict) and former in holder and key not in holder:
        holder[key] = holder.pop(former)
        document.places[*parent, key] = document.places.pop((*parent, former))


def read_text(path: Path, kind: str, hint: str) -> str:
    """Return the text of a file that should be UTF-8, without its byte order mark.

    Args:
        path: the file.
        kind: what it should be, with its article.
        hint: what to do where there is none.

    Raises:
        UserError: it cannot be read.
    """
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"Give the YAML file{f': {inside}' if inside.is_file() else ''}."
        raise UserError(f"is a folder, not {kind}", where=str(path), hint=hint)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path), hint=hint) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8", where=f"{path}:{line}", hint="Save the file as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error


def _validate_without_conflicts(document: Document, name: str) -> Recipe:
    """Validate; a setting of a higher layer removes settings of lower layers that it makes ineffective."""
    while True:
        recipe = _validate(document, name)
        conflicts = [found for found in find_conflicts(recipe) if document.value(found.keys) is not None]
        if not resolve_defaults(document, conflicts):
            refuse(conflict_problems(conflicts), document, name)
            return recipe


def _validate(document: Document, name: str) -> Recipe:
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as error:
        refuse(schema_problems(error.errors(include_url=False), document), document, name)
        raise
