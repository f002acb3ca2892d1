"""A recipe in the making: each line of another tool's configuration, and what has become of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from peftchat.recipe.document import Keys, dotted
from peftchat.recipe.error_messages import section_of
from peftchat.recipe.schema import Recipe
from peftchat.variants.low_rank import Lora

Status = Literal["kept", "changed", "left out", "refused"]

STATUSES: tuple[Status, ...] = ("kept", "changed", "left out", "refused")

IS_OFF = "off, as it is here"

EMPTY = "empty: the tool's default"

_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
"""Truth values of YAML 1.1, which the other tools read; in YAML 1.2 some of them are text."""


@dataclass(frozen=True)
class SourceLine:
    """One value of the other tool's file.

    Attributes:
        keys: its path in that file.
        value: what stands there.
        line: its line, from 1.
    """

    keys: Keys
    value: Any
    line: int | None

    @property
    def key(self) -> str:
        """The path as text."""
        return dotted(self.keys)


@dataclass
class ImportedLine:
    """What has become of one line.

    Attributes:
        source: the line.
        status: `kept` with the same meaning, `changed` to what is nearest, `left out` because it has no bearing on
            what is learned, or `refused` because it has and no recipe can say it.
        becomes: the keys of the recipe that it gave, with their values.
        why: the reason; empty for a line that is kept.
        blocks: without this line the file asks for something else altogether, so no recipe is made of it.
    """

    source: SourceLine
    status: Status
    becomes: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    blocks: bool = False


@dataclass(frozen=True)
class Assumed:
    """A value that the file does not hold: the other tool's own default, which differs from peftchat's."""

    key: str
    value: Any
    why: str


class Draft:
    """Collects the keys of a recipe, and where each comes from.

    Args:
        path: the other tool's file.
        values: its content.
        tool: the tool's name as people write it.
    """

    def __init__(self, path: Path, values: dict[str, Any], tool: str) -> None:
        self.path = path
        self.source = values
        self.tool = tool
        self.lines: list[ImportedLine] = []
        self.assumed: list[Assumed] = []
        self.values: dict[str, Any] = {}
        self.origins: dict[str, ImportedLine | Assumed] = {}
        self.to_give: dict[str, str] = {}
        self.pending: dict[str, SourceLine] = {}

    def get(self, key: str) -> Any:
        """Return a value of the file by its path; None where there is none."""
        found: Any = self.source
        for step in key.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
        return found

    def is_on(self, key: str) -> bool:
        """Return whether a switch of the file is on."""
        return as_bool(self.get(key)) is True

    def take(self, *keys: str) -> list[SourceLine]:
        """Return the lines that waited for others, and let them wait no more."""
        return [self.pending.pop(key) for key in keys if key in self.pending]

    def keep(self, line: SourceLine, to: str, value: Any) -> None:
        """Take a value over under our name, with the same meaning."""
        self._give(ImportedLine(line, "kept"), {to: value})

    def keep_all(self, line: SourceLine, becomes: Mapping[str, Any]) -> None:
        """Take over a value that stands in several keys here, with the same meaning."""
        self._give(ImportedLine(line, "kept"), becomes)

    def change(self, line: SourceLine, becomes: Mapping[str, Any], why: str) -> None:
        """Take a value over as something else; `becomes` may be empty where the recipe's default says it."""
        self._give(ImportedLine(line, "changed", why=why), becomes)

    def leave(self, line: SourceLine, why: str) -> None:
        """Leave out a line that has no bearing on what is learned."""
        self.lines.append(ImportedLine(line, "left out", why=why))

    def refuse(self, line: SourceLine, why: str, *, blocks: bool = False) -> None:
        """Refuse a line that changes what is learned, and that no recipe can say."""
        self.lines.append(ImportedLine(line, "refused", why=why, blocks=blocks))

    def assume(self, key: str, value: Any, why: str) -> None:
        """Set a key that the file leaves to its tool, unless it is set or peftchat's default is the same."""
        if key in self.values or any(known.startswith(f"{key}.") for known in self.values):
            return
        if value == _default(key):
            return
        entry = Assumed(key, value, why)
        self.assumed.append(entry)
        self.values[key], self.origins[key] = value, entry

    def ask(self, key: str, what: str) -> None:
        """Note what the user has still to give."""
        self.to_give.setdefault(key, what)

    def drop(self, key: str) -> ImportedLine | Assumed | None:
        """Remove a key and what is below it, and return where the first of them came from."""
        gone = [known for known in self.values if known == key or known.startswith(f"{key}.")]
        origin = None
        for known in gone:
            found = self.origins.pop(known, None)
            origin = origin or found
            del self.values[known]
            if isinstance(found, ImportedLine):
                found.becomes.pop(known, None)
            elif found in self.assumed:
                self.assumed.remove(found)
        return origin

    def origin(self, key: str) -> ImportedLine | Assumed | None:
        """Return where a key, or the nearest one around or below it, came from."""
        steps = key.split(".")
        for length in range(len(steps), 0, -1):
            start = ".".join(steps[:length])
            for known, origin in self.origins.items():
                if known == start or known.startswith(f"{start}."):
                    return origin
        return None

    def line_of(self, key: str) -> ImportedLine | None:
        """Return what has become of a line of the file."""
        return next((line for line in self.lines if line.source.key == key), None)

    def _give(self, entry: ImportedLine, becomes: Mapping[str, Any]) -> None:
        self.lines.append(entry)
        for key, value in becomes.items():
            known = self.origins.get(key)
            given = coerced(key, value)
            if isinstance(known, ImportedLine) and self.values[key] != given:
                place = f"line {known.source.line}: {known.source.key}"
                entry.status = "refused"
                entry.why = f"contradicts {place}, which gives `{key}: {shown(self.values[key])}`"
                continue
            if isinstance(known, Assumed):
                self.assumed.remove(known)
            self.values[key] = given
            if not isinstance(known, ImportedLine):
                self.origins[key] = entry
            entry.becomes[key] = given


def as_bool(value: Any) -> Any:
    """Return a truth value that is written as YAML 1.1 allows; anything else as it is."""
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value


def as_number(value: Any) -> Any:
    """Return a number that is written as text, such as `2e-5` in quotes; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        return value


def coerced(key: str, value: Any) -> Any:
    """Return a value in the type of our key, where the other tool's spelling of it allows that."""
    kinds = _kinds(key)
    if str in kinds:
        return value
    if bool in kinds:
        return as_bool(value)
    value = as_number(value) if {int, float} & kinds else value
    is_whole = isinstance(value, float) and value.is_integer() and float not in kinds and int in kinds
    return int(value) if is_whole else value


def shown(value: Any) -> str:
    """Return a value as it stands in YAML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(one) for one in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(held)}" for key, held in value.items()) + "}"
    return str(value).replace("\n", "\\n")


def _field(key: str) -> Any:
    section: Any = Recipe
    found = None
    for step in key.split("."):
        fields = getattr(section, "model_fields", {})
        found = fields.get(step)
        if found is None:
            return None
        section = Lora if step == "adapter" else section_of(found.annotation)
    return found


def _default(key: str) -> Any:
    found = _field(key)
    return None if found is None or found.is_required() else found.default


def _kinds(key: str) -> set[Any]:
    found = _field(key)
    return set() if found is None else set(_plain_types(found.annotation))


def _plain_types(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _plain_types(part)]
    if origin is Annotated:
        return _plain_types(get_args(annotation)[0])
    return [annotation]
