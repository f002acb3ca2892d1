"""A resolved recipe as YAML that runs again as it is, from any folder."""

import json
import re
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from peftchat.recipe.conflicts import find_conflicts
from peftchat.recipe.paths import make_absolute
from peftchat.recipe.schema import Recipe
from peftchat.recipe.training import OWN_KEYS


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Every key of `recipe` that has a value and an effect, as plain values."""
    idle = {conflict.keys for conflict in find_conflicts(recipe)}
    values: dict[str, Any] = {}
    for name, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            value = {key: held for key, held in value.items() if held is not None and (name, key) not in idle}
        if value is not None and (name,) not in idle:
            values[name] = value
    for entry in (entry for kind in ("train", "eval") for entry in values["data"].get(kind, ())):
        if entry["split"] is None:
            del entry["split"]
    return values


def dump_recipe(recipe: Recipe) -> str:
    """YAML of `recipe` with every default filled in and every local path absolute."""
    values = recipe_values(recipe)
    make_absolute(values)
    yaml = YAML()
    # YAML reads these as line breaks unless they are escaped, and then all of the text is.
    yaml.allow_unicode = not re.search("[\x85\u2028\u2029]", json.dumps(values, ensure_ascii=False))
    text = StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def training_arguments(recipe: Recipe) -> dict[str, Any]:
    """The `training` section as keyword arguments for transformers' TrainingArguments.

    Keys without effect are left out. Evaluation is off where there is nothing to evaluate on.
    """
    arguments: dict[str, Any] = recipe_values(recipe)["training"]
    for key in OWN_KEYS:
        arguments.pop(key, None)
    arguments |= {"logging_first_step": True, "logging_nan_inf_filter": False}
    if not recipe.data.has_eval:
        arguments |= {"eval_strategy": "no", "eval_on_start": False}
    return arguments
