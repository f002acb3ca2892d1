"""The recipe as text: every key with the line that it comes from, and at the top what is still to be done."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from peftchat.errors import UserError
from peftchat.importing.checking import PLACEHOLDERS
from peftchat.importing.draft import Assumed, ImportedLine, shown
from peftchat.importing.importing import Imported
from peftchat.recipe.document import parse_yaml, to_plain
from peftchat.recipe.reference import SCHEMA_FILE
from peftchat.recipe.schema import Recipe

_WIDTH = 100


def recipe_text(imported: Imported, target: Path) -> str:
    """Return a commented recipe.

    Args:
        imported: what was read.
        target: where the recipe will lie, for the command in its first lines.
    """
    lines = [f"# yaml-language-server: $schema={SCHEMA_FILE}", "#"]
    lines += [f"# Read from a file of {imported.tool.title}: {imported.path}", "#", f"#     peftchat train {target}"]
    if imported.to_give:
        lines += ["#", "# Still to give, or to look at:"]
        for key, what in imported.to_give.items():
            lines += _comment(f"- {key}: {what}", "")
    if imported.refused:
        lines += ["#", "# REFUSED, so that this recipe trains otherwise than that file:"]
        for line in imported.refused:
            lines += _comment(
                f"- line {line.source.line}, {line.source.key}: {shown(line.source.value)}: {line.why}", ""
            )
    values = {**imported.values}
    for key in imported.to_give:
        if key in PLACEHOLDERS:
            values.setdefault(key, PLACEHOLDERS[key])
    for section in Recipe.model_fields:
        held = {key: value for key, value in values.items() if key == section or key.startswith(f"{section}.")}
        if not held:
            continue
        lines.append("")
        if section in held:
            lines += _entry(section, held[section], imported, section, "")
        else:
            lines.append(f"{section}:")
            lines += _data(held, imported) if section == "data" else _section(section, held, imported)
    return "\n".join(lines) + "\n"


def _section(section: str, held: Mapping[str, Any], imported: Imported) -> Iterator[str]:
    written: set[str] = set()
    for key, value in held.items():
        name = key.removeprefix(f"{section}.")
        head, _, rest = name.partition(".")
        if not rest:
            yield from _entry(key, value, imported, name, "  ")
        elif head not in written:
            written.add(head)
            start = f"{section}.{head}."
            below = {other.removeprefix(start): one for other, one in held.items() if other.startswith(start)}
            yield from _entry(key, below, imported, head, "  ")


def _data(held: Mapping[str, Any], imported: Imported) -> Iterator[str]:
    for kind in ("train", "eval"):
        start = f"data.{kind}."
        numbers = sorted({key.split(".")[2] for key in held if key.startswith(start)}, key=int)
        if not numbers:
            continue
        yield f"  {kind}:"
        for number in numbers:
            yield from _source({key: held[key] for key in held if key.startswith(f"{start}{number}.")}, imported)
    for key, value in held.items():
        if key.count(".") == 1:
            yield from _entry(key, value, imported, key.removeprefix("data."), "  ")


def _source(held: Mapping[str, Any], imported: Imported) -> Iterator[str]:
    keys = sorted(held, key=lambda key: not key.endswith(".path"))
    mappings: dict[str, dict[str, Any]] = {}
    begins = "    - "
    said: set[str] = set()
    for key in keys:
        steps = key.split(".")
        if len(steps) > 4:
            mappings.setdefault(steps[3], {})[".".join(steps[4:])] = held[key]
            continue
        for line in _entry(key, held[key], imported, steps[3], ""):
            if not line.startswith("#"):
                yield f"{begins}{line}"
                begins = "      "
            elif line not in said:
                # One line of the other file may give several keys; its reason is said once.
                said.add(line)
                yield f"{begins if begins.isspace() else '    '}{line}"
    for name, mapping in mappings.items():
        yield f"{begins}{name}: {_scalar(mapping)}"
        begins = "      "


def _entry(key: str, value: Any, imported: Imported, name: str, indent: str) -> Iterator[str]:
    origin = imported.origins.get(key)
    if isinstance(origin, ImportedLine):
        source = origin.source
        place = f"line {source.line}: {source.key}"
        if origin.status == "changed":
            yield from _comment(f"{place}: {shown(source.value)}. {_sentence(origin.why)}", indent)
            place = ""
    elif isinstance(origin, Assumed):
        place = origin.why
    else:
        place = "to be given" if key in imported.to_give else ""
    yield f"{indent}{name}: {_scalar(value)}" + (f"  # {place}" if place else "")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in wrap(text, _WIDTH - len(indent) - 2):
        yield f"{indent}# {line}"


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line, without quotes where it means the same without them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(key))}: {_scalar(held)}" for key, held in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(one) for one in value) + "]"
    if not isinstance(value, str):
        return shown(value)
    if value and not set(value) & set(",[]{}#&*!|>'\"%@`:\n\\") and value == value.strip():
        try:
            if to_plain(parse_yaml(value, "value"), "value")[0] == value:
                return value
        except UserError:
            pass
    return json.dumps(value, ensure_ascii=False)
