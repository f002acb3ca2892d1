"""The JSON Schema of a recipe, for editors that complete and check YAML."""

import json
from pathlib import Path
from typing import Any

from peftchat.recipe.schema import Recipe

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")
"""The schema as shipped; a recipe names it in its first line."""


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file, which may extend another and then lack what that one has."""
    schema = Recipe.model_json_schema()
    sections: dict[str, Any] = schema["$defs"]
    needed = {name: sections[name].pop("required") for name in ("ModelSection", "DataSection")}
    for part in (schema, *sections.values()):
        for key, value in part["properties"].items():
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
