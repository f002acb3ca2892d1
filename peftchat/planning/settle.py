"""What a recipe leaves open about memory and batches, settled for this machine before training starts.

Every process of a run settles it for itself, so nothing here depends on what else the machine is doing.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftchat.errors import InputError
from peftchat.models.load import load_config
from peftchat.planning.automatic import TOKENS_AT_ONCE, choose_batch, choose_checkpointing
from peftchat.planning.hardware import own_hardware, own_processor
from peftchat.planning.planner import Planner
from peftchat.planning.settings import PlanSettings, attention_kind, plan_settings
from peftchat.training.choice import Choice
from peftchat.variants import entry

if TYPE_CHECKING:
    from peftchat.planning.hardware import Device
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.training.placement import Placement


def settle_open(loaded: "LoadedRecipe", placement: "Placement") -> "tuple[LoadedRecipe, tuple[Choice, ...]]":
    """Fill in what `training` leaves open: gradient checkpointing, and micro-batches for `rows_per_step`.

    Returns:
        The recipe with every value in place, and what was chosen.

    Raises:
        InputError: `rows_per_step` cannot be divided among the processes.
    """
    recipe = loaded.recipe
    training = recipe.training
    if training.gradient_checkpointing is not None and training.rows_per_step is None:
        return loaded, ()
    hardware = own_hardware(None) if placement.gpus else own_processor(placement.processes)
    planner = Planner(load_config(recipe, need_weights=False), recipe)
    settings = _settings(loaded, placement, hardware.device)
    values: dict[str, Any] = {}
    choices = []
    if training.gradient_checkpointing is None:
        if _may_checkpoint(recipe):
            chosen = choose_checkpointing(planner, settings, hardware.memory)
            settings, reason = chosen.settings, chosen.reason
        else:
            reason = "this variant does not bear it"
        values["gradient_checkpointing"] = settings.checkpointing
        choices.append(Choice("training.gradient_checkpointing", "true" if settings.checkpointing else "false", reason))
    if training.rows_per_step is not None:
        chosen = choose_batch(planner, settings, hardware.memory, TOKENS_AT_ONCE[hardware.device])
        batch, passes = chosen.settings.batch, chosen.settings.accumulation
        values |= {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": passes,
            "rows_per_step": None,
        }
        choices.append(Choice("training.per_device_train_batch_size", f"{batch}, {passes} times a step", chosen.reason))
    complete = recipe.model_copy(update={"training": training.model_copy(update=values)})
    return replace(loaded, recipe=complete), tuple(choices)


def _may_checkpoint(recipe: "Recipe") -> bool:
    return recipe.adapter is None or "checkpointing" not in entry(recipe.adapter.variant).refuses


def _settings(loaded: "LoadedRecipe", placement: "Placement", device: "Device") -> PlanSettings:
    recipe = loaded.recipe
    settings = plan_settings(
        recipe,
        strategy=placement.strategy,
        processes=placement.world_size,
        device=device,
        attention=attention_kind(recipe, device, None),
    )
    rows = recipe.training.rows_per_step
    if rows is None:
        return settings
    each, left = divmod(rows, placement.world_size)
    if left:
        raise InputError(
            f"{rows} rows cannot be divided among {placement.world_size} processes",
            where=loaded.where("training", "rows_per_step"),
            cure=f"Take a multiple of {placement.world_size}.",
        )
    # One row at a time decides whether checkpointing is needed at all.
    return settings.with_changes(batch=1, accumulation=each)
