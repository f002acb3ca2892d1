"""Choices that a user would otherwise tune, made from a prediction and told with their reason."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError
from peftchat.formatting import format_bytes
from peftchat.models.source import ModelSource
from peftchat.planning.hardware import this_machine
from peftchat.planning.planner import Planner, largest_batch
from peftchat.planning.settings import PlanSettings, settings_on
from peftchat.runs.run_summary import AutoSetting
from peftchat.variants import get_variant

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.training.distributed import DistributedSetup


MARGIN = 0.9
"""Share of a device's memory that a choice may fill: predictions are off by some percent."""

TOKENS_AT_ONCE: Mapping[str, int] = {"cuda": 16384, "cpu": 2048}
"""Tokens of one forward pass beyond which larger matrices run no faster."""


@dataclass(frozen=True, slots=True)
class OpenSettings:
    """Settings as they were chosen.

    Attributes:
        settings: with the choice made.
        peak: predicted bytes of one device.
        reason: in a few words, for the user.
    """

    settings: PlanSettings
    peak: int
    reason: str


def choose_open_settings(
    recipe: "Recipe", planner: "Planner", settings: PlanSettings, room: int
) -> tuple[PlanSettings, tuple[AutoSetting, ...]]:
    """Settle what `training` leaves open: gradient checkpointing, and micro-batches for `rows_per_step`.

    Args:
        settings: the recipe's, as far as it gives them.
        room: bytes of one device.

    Returns:
        The settings with every value in place, and what was chosen.
    """
    rows = recipe.training.rows_per_step
    choices = []
    if rows is not None:
        # One row at a time decides whether checkpointing is needed at all.
        settings = settings.with_changes(batch=1, accumulation=max(1, rows // settings.processes))
    if recipe.training.gradient_checkpointing is None:
        if _may_checkpoint(recipe):
            chosen = choose_checkpointing(planner, settings, room)
            settings, reason = chosen.settings, chosen.reason
        else:
            reason = "this variant does not bear it"
        choices.append(
            AutoSetting("training.gradient_checkpointing", "true" if settings.checkpointing else "false", reason)
        )
    if rows is not None:
        chosen = choose_batch(planner, settings, room, TOKENS_AT_ONCE[settings.device])
        settings = chosen.settings
        value = f"{settings.batch}, {settings.accumulation} times a step"
        choices.append(AutoSetting("training.per_device_train_batch_size", value, chosen.reason))
    return settings, tuple(choices)


def _may_checkpoint(recipe: "Recipe") -> bool:
    return recipe.adapter is None or get_variant(recipe.adapter.variant).why_not("checkpointing") is None


def choose_checkpointing(planner: "Planner", settings: PlanSettings, room: int) -> OpenSettings:
    """Gradient checkpointing only where the plan does not fit without it.

    Args:
        room: bytes of one device.
    """
    without = settings.with_changes(checkpointing=False)
    peak = planner.memory(without).total
    if peak <= MARGIN * room:
        return OpenSettings(without, peak, f"fits without checkpointing: {format_bytes(peak)} of {format_bytes(room)}")
    with_it = settings.with_changes(checkpointing=True)
    saved = planner.memory(with_it).total
    if saved >= peak:
        return OpenSettings(
            without, peak, f"checkpointing would not help: {format_bytes(peak)} of {format_bytes(room)}"
        )
    return OpenSettings(
        with_it,
        saved,
        f"{format_bytes(peak)} without checkpointing, {format_bytes(saved)} with it, of {format_bytes(room)}",
    )


def choose_batch(planner: "Planner", settings: PlanSettings, room: int, tokens: int) -> OpenSettings:
    """The largest micro-batch up to a budget of tokens that fits; rows of one optimizer step stay as many as asked for.

    Args:
        room: bytes of one device.
        tokens: beyond this many in one forward pass nothing gets faster.
    """
    rows = settings.batch * settings.accumulation
    fitting = largest_batch(planner, settings, int(MARGIN * room))
    most = max(1, min(rows, fitting, tokens // settings.length))
    # Whole micro-batches only, so that the step's rows stay exactly those of the recipe.
    batch = next(count for count in range(most, 0, -1) if rows % count == 0)
    chosen = settings.with_changes(batch=batch, accumulation=rows // batch)
    peak = planner.memory(chosen).total
    memory = f"{format_bytes(peak)} of {format_bytes(room)}"
    reason = f"{batch} x {settings.length} tokens at once, {rows // batch} times a step: {memory}"
    return OpenSettings(chosen, peak, reason)


def resolve_open(
    loaded: "LoadedRecipe", placement: "DistributedSetup"
) -> "tuple[LoadedRecipe, tuple[AutoSetting, ...]]":
    """Fill in what `training` leaves open: gradient checkpointing, and micro-batches for `rows_per_step`.

    Returns:
        The recipe with every value in place, and what was chosen.

    Raises:
        UserError: `rows_per_step` cannot be divided among the processes.
    """
    recipe = loaded.recipe
    training = recipe.training
    if training.gradient_checkpointing is not None and training.rows_per_step is None:
        return loaded, ()
    _check_rows(loaded, placement.world_size)
    hardware = this_machine(placement.processes)
    planner = Planner(ModelSource.of_recipe(recipe).config(), recipe)
    settings, choices = choose_open_settings(
        recipe, planner, settings_on(recipe, hardware, None, placement), hardware.memory
    )
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
            hint=f"Take a multiple of {processes}.",
        )
