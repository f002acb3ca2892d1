"""Settings of a resumed run: which may change, which may on request, and which a checkpoint depends on."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from peftchat.recipe import dump_recipe, load_recipe

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

# Keys that may change when a run is resumed: how long it goes on, what it reports, and where it runs.
_MAY_CHANGE = {
    "training": {
        "max_steps",
        "num_train_epochs",
        "max_train_tokens",
        "max_train_minutes",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "early_stopping_patience",
        "early_stopping_threshold",
        "on_spike",
        "on_oom",
        "hang_timeout",
        "report_to",
        "run_name",
        "dataloader_num_workers",
        "per_device_eval_batch_size",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_compile",
        "autotune",
        "global_batch_size",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    },
    "distributed": {"processes", "nodes", "strategy", "offload", "deepspeed_config"},
    "model": {"attention", "compute_dtype"},
}

# A checkpoint holds tensors that only these settings give their names and shapes.
_NEVER = (
    "method",
    "adapter.",
    "quantization.",
    "chat.template",
    "model.freeze_layers",
    "training.master_weights",
    "training.optimizer_in_backward",
)

# What other settings follow from is told in place of them.
_FIRST_TOLD = ("method", "objective")

_BATCH = "training: batch size per process and optimizer step"


def may_be_allowed(key: str) -> bool:
    """Return whether a fixed setting may change on request."""
    return not key.startswith(_NEVER)


def in_order_of_cause(keys: Iterable[str]) -> list[str]:
    """Return keys of settings, those that decide about others first."""
    return sorted(keys, key=lambda key: (key not in _FIRST_TOLD, key))


def shown_settings(before: object, now: object) -> tuple[str, str]:
    """Return two values of a setting as a recipe writes them; of lists of entries, only the keys that differ."""
    if _are_entries(before) and _are_entries(now) and len(before) == len(now):
        pairs = [_differences(*pair) for pair in zip(before, now, strict=True)]
        before, now = [one for one, _ in pairs], [other for _, other in pairs]
    return _in_yaml(before), _in_yaml(now)


def _are_entries(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list | tuple) and all(isinstance(entry, dict) for entry in value)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    keys = [key for key in now if before.get(key) != now[key]]
    return {key: before.get(key) for key in keys}, {key: now[key] for key in keys}


def _in_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_saved(recipe: "Recipe") -> "Recipe":
    """Return the recipe as it reads after being saved, with absolute paths."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        return load_recipe(file, to_train=False).recipe


def fixed_settings(recipe: "Recipe", *, with_paths: bool) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed, by `section.key`.

    Args:
        recipe: the recipe.
        with_paths: whether the places of base and data count, for runs whose content is not known.
    """
    values = recipe.model_dump(mode="json")
    # What is looked at does not change what is trained.
    values.pop("evaluation")
    if not with_paths:
        values["model"].pop("name")
        values["model"].pop("revision")
        values["model"].pop("adapter")
        for split in ("train", "eval"):
            values["data"][split] = [
                {key: value for key, value in entry.items() if key != "path"} for entry in values["data"][split] or ()
            ]
    flat: dict[str, Any] = {"method": values["method"], "objective": values["objective"]}
    for section, settings in values.items():
        if isinstance(settings, dict):
            may_change = _MAY_CHANGE.get(section, set())
            flat |= {f"{section}.{key}": value for key, value in settings.items() if key not in may_change}
    training = values["training"]
    # An optimizer step may be cut into micro-batches differently, but its batch size must stay.
    if training["global_batch_size"] is None:
        flat[_BATCH] = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    return flat
