"""What a recipe leaves open about memory and batches, settled for this machine before training starts.

Every process of a run settles it for itself, so nothing here depends on what else the machine is doing.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError
from peftchat.models.loading import load_config
from peftchat.planning.automatic import choose_open
from peftchat.planning.hardware import own_hardware
from peftchat.planning.make import settings_on
from peftchat.planning.planner import Planner

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe
    from peftchat.runs.run_summary import AutoSetting
    from peftchat.training.distributed import DistributedSetup


def settle_open(
    loaded: "LoadedRecipe", placement: "DistributedSetup"
) -> "tuple[LoadedRecipe, tuple[AutoSetting, ...]]":
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
    _check_rows(loaded, placement.world_size)
    hardware = own_hardware(placement.processes)
    planner = Planner(load_config(recipe, need_weights=False), recipe)
    settings, choices = choose_open(recipe, planner, settings_on(recipe, hardware, None, placement), hardware.memory)
    values: dict[str, Any] = {"gradient_checkpointing": settings.checkpointing}
    if training.rows_per_step is not None:
        values |= {
            "per_device_train_batch_size": settings.batch,
            "gradient_accumulation_steps": settings.accumulation,
            "rows_per_step": None,
        }
    complete = recipe.model_copy(update={"training": training.model_copy(update=values)})
    return replace(loaded, recipe=complete), choices


def _check_rows(loaded: "LoadedRecipe", processes: int) -> None:
    """Refuse rows of a step that cannot be shared out evenly."""
    rows = loaded.recipe.training.rows_per_step
    if rows is not None and rows % processes:
        raise UserError(
            f"{rows} rows cannot be divided among {processes} processes",
            where=loaded.where("training", "rows_per_step"),
            cure=f"Take a multiple of {processes}.",
        )
