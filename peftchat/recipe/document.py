"""YAML documents as plain values, with the place where each value was written."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from peftchat.chat_template.templates import TEMPLATE_SUFFIX
from peftchat.errors import UserError
from peftchat.paths import escape_path, exists, expand_path

Keys = tuple[str | int, ...]
"""The path to a value: `("data", "train", 0, "path")`."""

# A recipe has about a hundred values; aliases can unfold a short text into billions of them.
MOST_VALUES = 20_000
DEEPEST = 100
# Libraries hold whole numbers in 64 bits, and fail late at longer ones.
LARGEST_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class SourceLocation:
    """Where a value was written: a line of a file, or a `--set` flag (`file` is None).

    A higher `layer` wins: 1 is a `--set` flag, 0 the recipe, -1 what it extends, -2 what that extends.
    """

    name: str
    line: int | None = None
    file: Path | None = None
    layer: int = 0

    @property
    def label(self) -> str:
        """Return `file:line`, the file alone, or the flag."""
        return self.name if self.line is None else f"{self.name}:{self.line}"

    def of(self, keys: Keys) -> str:
        """Return this place and the key, as errors show them."""
        dotted = ".".join(str(key) for key in keys)
        if not dotted or self.label == f"--set {dotted}":
            return self.label
        return f"{self.label}: {dotted}"


@dataclass
class Document:
    """Plain values and their places; files and flags are merged into it in turn."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, SourceLocation] = field(default_factory=dict)

    def place(self, keys: Keys) -> SourceLocation:
        """Return the place of a value, or of the nearest value around it that has one."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.places:
                return self.places[keys[:length]]
        return self.places[()]

    def layer(self, keys: Keys) -> int | None:
        """Return the highest layer that wrote a key or a value below it; None if none did."""
        layers = [place.layer for known, place in self.places.items() if known[: len(keys)] == keys]
        return max(layers, default=None)

    def value(self, keys: Keys) -> Any:
        """Return the value at `keys`; None if there is none."""
        found: Any = self.values
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def remove(self, keys: Keys) -> None:
        """Remove a key from its mapping, as if it had not been written."""
        self.forget(keys)
        self.value(keys[:-1]).pop(keys[-1])

    def forget(self, keys: Keys) -> None:
        """Remove the places of a value that will be replaced, and of all values below it."""
        for known in [known for known in self.places if known[: len(keys)] == keys]:
            del self.places[known]


def dotted(keys: Keys) -> str:
    """Return keys as a user writes them: `data.train.0.path`."""
    return ".".join(str(key) for key in keys)


def parse_yaml(text: str, name: str) -> Any:
    """Parse one YAML 1.2 document, keeping line numbers.

    Args:
        text: the YAML.
        name: its name in error messages.

    Raises:
        UserError: the text is not YAML, or a key occurs twice.
    """
    try:
        return _parsed(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
        what = str(error.problem or error.context)
        raise UserError(f"not valid YAML: {what}", where=where, hint=_hint(what)) from error
    except YAMLError as error:
        raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from error
    except RecursionError as error:
        raise UserError("not valid as a recipe: nested too deeply", where=name) from error
    except ValueError as error:
        raise UserError(f"not valid YAML: {error}", where=name) from error


class _Constructor(RoundTripConstructor):
    """Constructs dates as the texts they are in YAML 1.2; ruamel takes them for values of YAML 1.1."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Any:
    """Return a document that nobody changes: a run reads its recipe several times, and ruamel takes long for it."""
    yaml = YAML(typ="rt")
    yaml.Constructor = _Constructor
    return yaml.load(text)


def _hint(problem: str) -> str:
    if "duplicate key" in problem:
        return "Keep one of the two."
    if "mapping values are not allowed" in problem:
        return "Check the indentation, and put text that holds `: ` in quotes."
    if "\\t" in problem:
        return "Indent with spaces, not tabs."
    if "another document" in problem:
        return "A recipe is one document: remove the `---` line."
    return "Check brackets, quotes and indentation around there."


class _Reader:
    """Converts ruamel's values into plain ones, up to a limit that aliases could exceed."""

    def __init__(self, name: str, file: Path | None, layer: int) -> None:
        self.name = name
        self.file = file
        self.layer = layer
        self.places: dict[Keys, SourceLocation] = {}
        self.seen = 0

    def read(self, node: Any, keys: Keys, line: int | None) -> Any:
        self.seen += 1
        place = SourceLocation(self.name, line, self.file, self.layer)
        if self.seen > MOST_VALUES or len(keys) > DEEPEST:
            raise UserError(
                "holds more values, or deeper ones, than any recipe", where=place.label, hint="Check its aliases."
            )
        self.places[keys] = place
        if isinstance(node, CommentedMap):
            return {key: self.read(value, (*keys, key), at) for key, value, at in self.entries(node, line)}
        if isinstance(node, CommentedSeq):
            return [self.read(item, (*keys, at), self.line(node, at, line)) for at, item in enumerate(node)]
        return self.scalar(node, place, keys)

    def entries(self, node: CommentedMap, around: int | None) -> Iterator[tuple[str, Any, int | None]]:
        for key, value in node.items():
            yield _without_surrogates(str(key), self.name), value, self.line(node, key, around)

    def line(self, node: CommentedMap | CommentedSeq, key: Any, around: int | None) -> int | None:
        """Return the line of an entry, from 1; for an entry of a merge key (`<<`), the line of that key."""
        known: Mapping[Any, list[int]] = node.lc.data or {}
        return known[key][0] + 1 if key in known and self.file is not None else around

    def scalar(self, node: Any, place: SourceLocation, keys: Keys) -> str | int | float | bool | None:
        if node is None or type(node) is bool:
            return node
        if isinstance(node, ScalarBoolean):  # a boolean with an anchor, which ruamel derives from int
            return bool(node)
        if isinstance(node, str):
            return _without_surrogates(str(node), place.of(keys))
        if isinstance(node, int) and abs(node) > LARGEST_NUMBER:
            raise UserError("holds a whole number of more than 64 bits, which no key takes", where=place.of(keys))
        for to_plain in (int, float):
            if isinstance(node, to_plain):
                return to_plain(node)
        raise UserError(
            f"holds {_kind(node)}, which no key takes",
            where=place.of(keys),
            hint="Put it in quotes if it is meant as text.",
        )


def _without_surrogates(text: str, where: str) -> str:
    """Return a text whose surrogate pairs, which YAML can write as two escapes, are joined.

    Raises:
        UserError: one half of a pair is missing, so the text cannot be written to a file.
    """
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise UserError("holds half of a surrogate pair", where=where, hint="Write the character itself.") from error


def _kind(node: Any) -> str:
    tag = getattr(node, "tag", None)
    return f"a value tagged `{tag.value}`" if tag is not None and tag.value else "a special value"


def to_plain(
    node: Any, name: str, *, keys: Keys = (), file: Path | None = None, layer: int = 0
) -> tuple[Any, dict[Keys, SourceLocation]]:
    """Convert what `parse_yaml` returned to plain Python values, and return the place of each.

    Args:
        node: the parsed YAML.
        name: how places begin: a file's name (lines follow) or a flag (no lines).
        keys: where the values will stand in the recipe.
        file: the file they come from; None for a flag.
        layer: see Place.
    """
    reader = _Reader(name, file, layer)
    values = reader.read(node, keys, None)
    return values, reader.places


LOCAL_MARKS = ("/", "./", "../", "~")
"""Prefixes of paths, which no hub id has."""


def path_keys(values: dict[str, Any]) -> Iterator[Keys]:
    """Return the keys in `values` that can hold the path of an input."""
    if isinstance(values.get("model"), dict):
        yield ("model", "name")
        yield ("model", "adapter")
    if isinstance(values.get("distributed"), dict):
        yield ("distributed", "deepspeed_config")
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict):
        yield ("evaluation", "include")
        if isinstance(evaluation.get("questions"), str):
            yield ("evaluation", "questions")
    chat = values.get("chat")
    if isinstance(chat, dict) and str(chat.get("template")).endswith(TEMPLATE_SUFFIX):
        yield ("chat", "template")
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


def expand_paths(document: Document) -> None:
    """Replace `~` and environment variables in all paths of a recipe, `output_dir` too.

    Raises:
        UserError: a variable is not set, or no file can have such a name; the key is named.
    """
    for keys in (*path_keys(document.values), ("output_dir",)):
        holder, key = _holder(document.values, keys), str(keys[-1])
        value = holder.get(key)
        # An empty text is refused with the other values.
        if isinstance(value, str) and value:
            holder[key] = expand_path(value, document.place(keys).of(keys))


def find_beside_recipe(document: Document) -> None:
    """Replace paths that exist beside their recipe, but not in the current folder."""
    for keys in path_keys(document.values):
        holder, key = _holder(document.values, keys), str(keys[-1])
        value, file = holder.get(key), document.place(keys).file
        if not isinstance(value, str) or not value or file is None or exists(value):
            continue
        if exists(str(beside := file.parent / value)):
            holder[key] = str(beside)


def make_absolute(values: dict[str, Any]) -> None:
    """Replace local paths in the plain values of a recipe by absolute ones, written for YAML; hub ids stay."""
    for keys in path_keys(values):
        holder, key = _holder(values, keys), str(keys[-1])
        value = holder.get(key)
        if isinstance(value, str) and (value.startswith(LOCAL_MARKS) or exists(value)):
            holder[key] = escape_path(_absolute(value))
    values["output_dir"] = escape_path(_absolute(values["output_dir"]))


def _absolute(path: str) -> str:
    """Return an absolute path; one that is absolute already stays as it is written."""
    return path if Path(path).is_absolute() else str(Path(path).absolute())


def merge_recipes(base: Document, over: Document) -> Document:
    """Return `base` with the values and places of `over` merged over it. Lists are replaced, not joined."""
    merged = Document(dict(base.values), dict(base.places))
    _lay(merged, merged.values, over, over.values, ())
    merged.places[()] = over.places[()]
    return merged


def _lay(merged: Document, into: dict[str, Any], over: Document, values: dict[str, Any], keys: Keys) -> None:
    for key, value in values.items():
        here = (*keys, key)
        below = into.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            into[key] = dict(below)
            merged.places[here] = over.places[here]
            _lay(merged, into[key], over, value, here)
            continue
        merged.forget(here)
        into[key] = value
        merged.places |= {known: place for known, place in over.places.items() if known[: len(here)] == here}


def apply_override(document: Document, flag: str) -> None:
    """Apply one `--set` flag to `document`.

    Args:
        document: changed in place.
        flag: `a.b.c=YAML`; a whole number steps into a list (`data.train.0.path=x`).

    Raises:
        UserError: the flag is not of that form, its value is not YAML, or its path leads nowhere.
    """
    path, equals, text = flag.partition("=")
    path = path.strip()
    where = f"--set {path}"
    steps = path.split(".")
    if not equals or not all(steps):
        raise UserError(
            "not of the form KEY=VALUE",
            where=f"--set {flag}",
            hint="Write for example `--set training.learning_rate=1e-4`.",
        )
    if steps[0] == "extends":
        raise UserError("`extends` can only stand in a file", where=where, hint="Pass that file instead.")
    keys, holder = _descend(document, steps, where)
    document.forget(keys)
    value, places = to_plain(parse_yaml(text, where), where, keys=keys, layer=1)
    holder[keys[-1]] = value
    document.places |= places


def _descend(document: Document, steps: list[str], where: str) -> tuple[Keys, Any]:
    """Return the keys that the steps name, and the mapping or list that holds the last one."""
    keys: Keys = ()
    holder: Any = document.values
    for position, step in enumerate(steps):
        key: str | int = step
        if isinstance(holder, list):
            key = _index(step, holder, keys, where)
        elif not isinstance(holder, dict):
            raise UserError(f"`{dotted(keys)}` holds a single value, not keys", where=where)
        keys = (*keys, key)
        if position == len(steps) - 1:
            break
        if isinstance(holder, dict) and holder.get(step) is None:
            holder[step] = {}
            document.places[keys] = SourceLocation(where, layer=1)
        holder = holder[key]
    return keys, holder


def _index(step: str, holder: list[Any], keys: Keys, where: str) -> int:
    if step.isdecimal() and int(step) < len(holder):
        return int(step)
    raise UserError(
        f"`{dotted(keys)}` is a list of {len(holder)}, and `{step}` is none of its places",
        where=where,
        hint=f"Use a number from 0 to {len(holder) - 1}, or set the whole list.",
    )


def flat_values(text: str) -> dict[str, Any]:
    """Return the values of a recipe's YAML by dotted key."""
    values, _ = to_plain(parse_yaml(text, "recipe"), "recipe")
    flat: dict[str, Any] = {}
    for section, value in values.items():
        flat |= {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {section: value}
    return flat
