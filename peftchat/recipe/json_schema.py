"""The JSON Schema of a recipe, for editors that complete and check YAML."""

import json
from pathlib import Path
from typing import Any

from peftchat.recipe.schema import Recipe
from peftchat.variants import VARIANTS, AdapterSection

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
    schema["then"] = {
        "required": schema.pop("required"),
        "properties": {
            "model": {"required": needed["ModelSection"]},
            "data": {"required": needed["DataSection"]},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftchat recipe",
        **schema,
    }


def _adapter_sections() -> dict[str, Any]:
    """The `adapter` section, whose keys depend on its variant, and a section for each variant."""
    sections: dict[str, Any] = {}
    choices: list[dict[str, Any]] = []
    for variant in VARIANTS.values():
        if variant.options is None:
            continue
        name = variant.options.__name__
        sections[name] = variant.options.model_json_schema()
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
    names = [name for variant in VARIANTS.values() if variant.options for name in (variant.name, *variant.aliases)]
    kinds = {"enum": names, "type": "string", "default": "lora", "description": _meaning_of_variant()}
    whole = {
        "description": AdapterSection.__doc__,
        "type": "object",
        "properties": {"variant": kinds},
        "allOf": [*choices, unnamed],
    }
    return {**sections, "AdapterSection": whole}


def _meaning_of_variant() -> str:
    return AdapterSection.model_fields["variant"].description or ""


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
