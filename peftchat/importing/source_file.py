"""Reading another tool's file: YAML, JSON, or the flags of a command in a shell script."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.errors import UserError
from peftchat.importing.draft import SourceLine
from peftchat.recipe.document import Document, Keys, SourceLocation, parse_yaml, to_plain
from peftchat.recipe.load import read_text

_SHELL_SUFFIXES = (".sh", ".bash")
_PROGRAM_SUFFIXES = (".py", ".ipynb")
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\S.*)?$")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")

DEEPEST_REFERENCE = 10
"""References that lead to references are followed this far; a circle would have no end."""


@dataclass(frozen=True)
class SourceFile:
    """Another tool's file.

    Attributes:
        path: the file.
        text: its text.
        document: its values with their lines.
        command: the words of the command before its flags; empty for YAML and JSON.
    """

    path: Path
    text: str
    document: Document
    command: tuple[str, ...] = ()

    def lines(self) -> Iterator[SourceLine]:
        """Return every value with its path and line."""
        yield from self.below(self.document.values, ())

    def below(self, value: Any, keys: Keys) -> Iterator[SourceLine]:
        """Return the values below a path; a list of single values is one value."""
        if isinstance(value, Mapping) and value:
            for key, held in value.items():
                yield from self.below(held, (*keys, key))
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for at, held in enumerate(value):
                yield from self.below(held, (*keys, at))
        else:
            yield self.at(keys, value)

    def at(self, keys: Keys, value: Any) -> SourceLine:
        """Return a value with its line."""
        return SourceLine(keys, value, self.document.place(keys).line if keys else None)


def read_source(path: Path) -> SourceFile:
    """Read another tool's file.

    Raises:
        UserError: it cannot be read, is empty, or holds no keys with values.
    """
    name = str(path)
    text = read_text(path, "a configuration", "Give the file that the other tool reads.")
    if path.suffix in _SHELL_SUFFIXES:
        return _of_script(path, text)
    if path.suffix in _PROGRAM_SUFFIXES:
        hint = "Write a recipe with `peftchat init`, and carry the values over by hand."
        raise UserError("is a program, and nothing is run to read its settings", where=name, hint=hint)
    values, places = to_plain(parse_yaml(text, name), name, file=path)
    if values is None:
        raise UserError("the file is empty", where=name, hint="Give the file that the other tool reads.")
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "plain text"
        raise UserError(f"holds {found}, expected keys with values", where=name, hint=_hint(text))
    if not values:
        raise UserError("the file is empty", where=name, hint="Give the file that the other tool reads.")
    return SourceFile(path, text, Document(values, places))


def _hint(text: str) -> str:
    if "--" in text:
        return "A script with a command needs the ending `.sh`."
    return "Give the YAML or JSON file that the other tool reads."


def with_references(source: SourceFile) -> SourceFile:
    """Return a file in which `${a.b}` is replaced by the value of `a.b`, as OmegaConf does.

    What leads nowhere, or asks for a computation, stays as it is written.
    """
    values = _resolved(source.document.values, source.document.values, DEEPEST_REFERENCE)
    return SourceFile(source.path, source.text, Document(values, source.document.places), source.command)


def _resolved(value: Any, root: Mapping[str, Any], depth: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolved(held, root, depth) for key, held in value.items()}
    if isinstance(value, list):
        return [_resolved(held, root, depth) for held in value]
    if not isinstance(value, str) or depth == 0:
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None:
        found = _looked_up(whole[1], root)
        return value if found is None else _resolved(found, root, depth - 1)

    def replaced(match: re.Match[str]) -> str:
        found = _looked_up(match[1], root)
        return match[0] if found is None or isinstance(found, Mapping | list) else str(found)

    text = _REFERENCE.sub(replaced, value)
    return text if text == value else _resolved(text, root, depth - 1)


def _looked_up(path: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for step in path.split("."):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _of_script(path: Path, text: str) -> SourceFile:
    """Read the flags of the one training command in a shell script."""
    name = str(path)
    variables: dict[str, str] = {}
    places: dict[Keys, SourceLocation] = {(): SourceLocation(name, 1, path)}
    values: dict[str, Any] = {}
    command: list[str] = []
    current: str | None = None
    continues = False
    for number, line in enumerate(text.splitlines(), 1):
        assigned = _ASSIGNMENT.match(line)
        if assigned and not continues and "--" not in line:
            variables[assigned[1]] = (assigned[2] or "").strip().strip("\"'")
            continue
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            words = shlex.split(stripped.removesuffix("\\"), comments=True)
        except ValueError as error:
            raise UserError(f"not a shell command: {error}", where=f"{name}:{number}", hint="Check quotes.") from error
        if not continues:
            current = None
            if any(word.startswith("--") for word in words) and values:
                hint = "Keep the command of one training in the script."
                raise UserError("holds more than one command with flags", where=f"{name}:{number}", hint=hint)
        for word in words:
            word = _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)
            if word.startswith("--") and len(word) > 2:
                flag, equals, value = word[2:].partition("=")
                current = flag.replace("-", "_")
                if current in values:
                    where = f"{name}:{number}"
                    raise UserError(f"the flag `--{flag}` is there twice", where=where, hint="Keep one of the two.")
                values[current] = _scalar(value) if equals else True
                places[(current,)] = SourceLocation(name, number, path)
            elif current is None or _begins_program(word, command, values[current]):
                # A launcher's flags stand before the program that it starts.
                command.append(word)
                current = None
            elif values[current] is True:
                values[current] = _scalar(word)
            else:
                held = values[current]
                values[current] = [*(held if isinstance(held, list) else [held]), _scalar(word)]
        continues = line.rstrip().endswith("\\")
    if not values:
        hint = "Give a script with a command such as `trl sft --model_name_or_path …`."
        raise UserError("holds no command with flags", where=name, hint=hint)
    return SourceFile(path, text, Document(values, places), tuple(command))


_LAUNCHERS = frozenset({"accelerate", "torchrun", "deepspeed"})
_PROGRAMS = frozenset({"trl", "axolotl", "tune", "llamafactory-cli", "lmf", "swift"})


def _begins_program(word: str, command: Sequence[str], held: Any) -> bool:
    """Whether a word is the program that a launcher starts, and no value of the launcher's last flag.

    Args:
        word: the word behind the flag, or behind its value.
        command: the words before the flags.
        held: the value of the flag so far; True if there is none.
    """

    def is_program(one: str) -> bool:
        return one.endswith(".py") or one in _PROGRAMS

    is_launched = any(Path(one).name in _LAUNCHERS or one.startswith("torch.distributed") for one in command)
    return is_program(word) and not any(map(is_program, command)) and (is_launched or held is not True)


def _scalar(word: str) -> Any:
    try:
        value, _ = to_plain(parse_yaml(word, "flag"), "flag")
    except UserError:
        return word
    return word if value is None else value
