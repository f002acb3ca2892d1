"""Every key of a recipe as a row (type, default, meaning): for the manual, and for a first recipe to fill in."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from peftchat.recipe.error_messages import section_of
from peftchat.recipe.objectives import PAIR_OBJECTIVES
from peftchat.recipe.schema import Recipe
from peftchat.recipe.sections import DataEntry, Method
from peftchat.strict_model import StrictModel
from peftchat.variants import ADAPTERS, Adapter
from peftchat.variants.low_rank import Lora


@dataclass(frozen=True)
class KeyRow:
    """One key: its name, what it takes, its default as YAML (None if it must be given), its meaning."""

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class SectionRows:
    """One section of the recipe, or the top level (`name` empty)."""

    name: str
    meaning: str
    keys: tuple[KeyRow, ...]


def sections() -> Iterator[SectionRows]:
    """The top level and each section, in the order of a recipe."""
    yield SectionRows("", "", tuple(_rows(Recipe, skip_sections=True)))
    for name, info in Recipe.model_fields.items():
        if (section := section_of(info.annotation)) is not None:
            # Each variant has keys of its own; those of the default one stand for them.
            shown = Lora if section is Adapter else section
            yield SectionRows(name, info.description or "", tuple(_rows(shown)))


def _variant_row() -> KeyRow:
    info = Adapter.model_fields["variant"]
    return KeyRow("variant", "a name", default_text(info), info.description or "")


def _rows(section: type[StrictModel], skip_sections: bool = False) -> Iterator[KeyRow]:
    for name, info in section.model_fields.items():
        if name == "variant":
            yield _variant_row()
            continue
        if skip_sections and section_of(info.annotation) is not None:
            continue
        yield KeyRow(name, type_name(info.annotation), default_text(info), info.description or "")


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def type_name(annotation: Any) -> str:
    """A type in the words of someone who writes YAML."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if origin is Annotated:
        return type_name(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {type_name(parts[0])}"
    if origin in (Union, UnionType):
        return " or ".join(type_name(part) for part in parts if part is not NoneType)
    return "entries (below)" if isinstance(annotation, type) and issubclass(annotation, StrictModel) else "mapping"


def default_text(info: FieldInfo) -> str | None:
    """The default as one would write it in YAML; None for a key that must be given."""
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "x-default-text" in extra:
        return str(extra["x-default-text"])
    if info.is_required():
        return None
    default = info.default
    if isinstance(default, bool):
        return "true" if default else "false"
    if default is None:
        return "null"
    return "none" if default == () else f"{default:g}" if isinstance(default, float) else str(default)


def manual() -> str:
    """The page `docs/recipe.md`."""
    lines = [_HEAD]
    for section in sections():
        lines.append(f"## `{section.name}`\n" if section.name else "## Top level\n")
        if section.meaning:
            lines.append(f"{section.meaning}\n")
        lines.append(_table(section.keys))
        if section.name == "adapter":
            lines.append(_ADAPTER_NOTE)
            lines += _variant_tables()
        if section.name == "data":
            lines.append("### An entry of `data.train` or `data.eval`\n")
            lines.append(_table(tuple(_rows(DataEntry))))
    # A key's description names a page as `docs/NAME.md`; in the manual that page is a link.
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", "\n".join(lines)).rstrip() + "\n"


def _variant_tables() -> Iterator[str]:
    """The keys of each variant that LoRA has not, or that stand for something else there."""
    shared = {row.name: row for row in _rows(Lora)}
    for variant in ADAPTERS.values():
        if variant is Lora:
            continue
        rows = [row for row in _rows(variant) if row.name != "variant"]
        same = [f"`{row.name}`" for row in rows if shared.get(row.name) == row]
        own = tuple(row for row in rows if shared.get(row.name) != row)
        yield f"### `{variant.name}`\n"
        taken = f" Takes {', '.join(same)} as above{', and' if own else '.'}" if same else " Takes" if own else ""
        yield f"{variant.summary}{taken or ' Takes no settings.'}\n"
        if own:
            yield _table(own)


def _table(rows: tuple[KeyRow, ...]) -> str:
    lines = ["| Key | Takes | Default | Meaning |", "|---|---|---|---|"]
    for row in rows:
        default = "must be given" if row.default is None else f"`{row.default}`"
        cells = (f"`{row.name}`", row.type, default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_ADAPTER_NOTE = """\
These are the keys of `lora`. Each variant takes settings of its own, listed below; a setting of another variant is an
error. Where a recipe (or `--set adapter.variant=NAME`) changes the variant of the one it extends, the settings that
the new variant does not take go with the old one. `peftchat variants NAME` shows the same on the command line.
"""

_HEAD = """\
# The recipe

<!-- Written by scripts/make_recipe_docs.py from the types in peftchat/recipe. Change those, not this page. -->

A recipe is a YAML 1.2 file that says everything a run does. An unknown key, a wrong type or a combination that cannot
work is an error before anything is loaded; all errors are reported together, each with its file, line, key and hint.

- `null` stands for the default, also for a whole section.
- `extends: other.yaml` takes the keys of another recipe (its path is relative to this file). Mappings are merged key
  by key, lists are replaced.
- `--set section.key=VALUE` puts one value on top; the value is YAML: `--set training.learning_rate=1e-4`,
  `--set data.train='[{path: conversations.jsonl}]'`, `--set data.train.0.path=conversations.jsonl`.
- What is laid on top wins: `--set method=full` also switches off the `adapter` section below it. Two settings side by
  side that exclude each other are an error.
- Paths are relative to the folder you work in. One that does not exist there and does beside the recipe is taken from
  beside the recipe.
- Numbers may be written as `1e-4`. Truth values are `true` and `false`; `yes`, `no` and dates are text in YAML 1.2.
- Editors with a YAML language server complete and check recipes whose first line is
  `# yaml-language-server: $schema=` and the path of `peftchat/recipe/recipe.schema.json`.
"""


SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")
"""The schema as shipped; a recipe names it in its first line."""


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file, which may extend another and then lack what that one has."""
    schema = Recipe.model_json_schema()
    sections: dict[str, Any] = schema["$defs"]
    sections |= _adapter_sections()
    needed = {name: sections[name].pop("required") for name in ("ModelSection", "DataSection")}
    for part in (schema, *sections.values()):
        for key, value in part.get("properties", {}).items():
            part["properties"][key] = _or_null(_without_titles(value))
        part.pop("title", None)
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe, relative to this file, whose keys hold where this one has none.",
    }
    schema["if"] = {"not": {"required": ["extends"]}}
    begins_at_run = {"properties": {"model": {"required": ["adapter"]}}}
    # A run that a recipe begins at brings the base and the method.
    schema["then"] = {
        "required": [key for key in schema["required"] if key != "method"],
        "properties": {"data": {"required": needed["DataSection"]}},
        "anyOf": [
            begins_at_run,
            {"required": ["method"], "properties": {"model": {"required": needed["ModelSection"]}}},
        ],
    }
    del schema["required"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftchat recipe",
        **schema,
    }


def _adapter_sections() -> dict[str, Any]:
    """The `adapter` section, whose keys depend on its variant, and a section for each variant."""
    sections: dict[str, Any] = {}
    choices: list[dict[str, Any]] = []
    for variant in ADAPTERS.values():
        name = variant.__name__
        sections[name] = variant.model_json_schema()
        sections[name]["properties"]["variant"] = {"enum": [variant.name, *variant.aliases], "type": "string"}
        is_this = {"properties": {"variant": {"enum": [variant.name, *variant.aliases]}}, "required": ["variant"]}
        choices.append({"if": is_this, "then": {"$ref": f"#/$defs/{name}"}})
    # A recipe that extends another may leave the variant to that one.
    homes: dict[str, list[dict[str, str]]] = {}
    for name, section in sections.items():
        for key in section["properties"]:
            homes.setdefault(key, []).append({"$ref": f"#/$defs/{name}/properties/{key}"})
    any_key = {"properties": {key: {"anyOf": home} for key, home in homes.items()}, "additionalProperties": False}
    unnamed = {"if": {"not": {"required": ["variant"]}}, "then": any_key}
    names = [name for variant in ADAPTERS.values() for name in (variant.name, *variant.aliases)]
    kinds = {"enum": names, "type": "string", "default": "lora", "description": _meaning_of_variant()}
    whole = {
        "description": "The adapter; its keys depend on `variant`.",
        "type": "object",
        "properties": {"variant": kinds},
        "allOf": [*choices, unnamed],
    }
    return {**sections, "Adapter": whole}


def _meaning_of_variant() -> str:
    return Adapter.model_fields["variant"].description or ""


def _without_titles(value: dict[str, Any]) -> dict[str, Any]:
    # The default of a whole section would repeat the defaults of all its keys.
    section_default = "$ref" in value
    return {key: part for key, part in value.items() if key != "title" and not (key == "default" and section_default)}


def _or_null(value: dict[str, Any]) -> dict[str, Any]:
    """Any key may hold null, which stands for its default."""
    if {"type": "null"} in value.get("anyOf", []):
        return value
    notes: dict[str, Any] = {key: value.pop(key) for key in ("description", "default", "examples") if key in value}
    return {**notes, "anyOf": [value, {"type": "null"}]}


def schema_text() -> str:
    """The schema as it stands in SCHEMA_FILE."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


_WIDTH = 100

_ALWAYS = {
    "model": ("name",),
    "adapter": ("r", "alpha"),
    "quantization": ("bits",),
    "chat": ("template", "system", "loss_on"),
    "data": ("train", "eval_fraction", "max_length"),
    "training": (
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ),
}
"""The keys that are written out; all others stand as comments with their defaults."""

_SECTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "lora": ("adapter",),
    "qlora": ("adapter", "quantization"),
}


def starting_recipe(
    method: Method,
    target: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> str:
    """The text of a commented recipe for `method`.

    Args:
        method: what is to be trained.
        target: where the recipe will lie, for the command in its first lines.
        model: folder or hub id of the base model; left to be filled in where it is None.
        data: file, folder or hub id of the conversations; left to be filled in where it is None.
        settings: further keys with their values as YAML; they are written out.
    """
    chosen = settings or {}
    values = {
        "method": method,
        "output_dir": json.dumps(f"runs/{target.stem}", ensure_ascii=False),
        "model.name": "" if model is None else json.dumps(model, ensure_ascii=False),
        "data.train": "" if data is None else f"[{{path: {json.dumps(data, ensure_ascii=False)}}}]",
        "data.eval_fraction": "0.05",
        "training.learning_rate": "auto",
        **chosen,
    }
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "#",
        f"#     peftchat train {target}",
        "#",
        "# Keys that are commented out show their defaults. Check before training: `--dry-run`.",
    ]
    top, *others = sections()
    for section in (top, *others):
        optional = ("adapter", "quantization", *PAIR_OBJECTIVES)
        if section.name in optional and section.name not in _SECTIONS_OF[method]:
            continue
        lines += ["", *_starter_section(section, values, chosen)]
    return "\n".join(lines) + "\n"


def _starter_section(section: SectionRows, values: Mapping[str, str], chosen: Collection[str]) -> Iterator[str]:
    indent = "  " if section.name else ""
    if section.name:
        yield from _comment(section.meaning, "")
        yield f"{section.name}:"
    for row in section.keys:
        yield from _comment(row.meaning, indent)
        key = f"{section.name}.{row.name}" if section.name else row.name
        is_written = not section.name or row.name in _ALWAYS.get(section.name, ()) or key in chosen
        yield from _key(row, values.get(key, row.default), indent, is_written=is_written)


def _key(row: KeyRow, value: str | None, indent: str, *, is_written: bool) -> Iterator[str]:
    if not is_written:
        yield f"{indent}# {row.name}: {value}"
    elif value:
        yield f"{indent}{row.name}: {value}"
    else:
        yield f"{indent}{row.name}:  # to be filled in"


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in wrap(text, _WIDTH - len(indent) - 2):
        yield f"{indent}# {line}"
