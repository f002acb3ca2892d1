"""Auto settings: checkpointing and micro-batch size by memory, the learning rate by a rule, the compute dtype."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError
from peftchat.formatting import format_bytes, format_rate
from peftchat.models.source import ModelSource
from peftchat.planning.compute_dtype import KEY as COMPUTE_DTYPE
from peftchat.planning.compute_dtype import choose_compute_dtype
from peftchat.planning.hardware import Hardware, this_cpu, this_machine
from peftchat.planning.planner import Planner, largest_batch
from peftchat.planning.settings import PlanSettings, settings_for
from peftchat.recipe import load_recipe
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import AutoSetting
from peftchat.training.rate_rule import rule_rate

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.training.distributed import DistributedSetup


MARGIN = 0.9
"""Fraction of a device's memory that a setting may fill, since predictions have an error."""

AMPLE = 0.5
"""Fraction of a device's memory that an upper bound may fill, so that nothing is traced: tracing takes seconds."""

_LOGITS = 2**30
"""Bytes of the logits of a few chunks, and of what libraries hold."""

MAX_TOKENS_PER_PASS: Mapping[str, int] = {"cuda": 16384, "cpu": 2048}
"""Tokens per forward pass beyond which larger matrices run no faster."""


@dataclass(frozen=True, slots=True)
class ChosenSettings:
    """Settings with one of them chosen.

    Attributes:
        settings: the complete settings.
        peak_bytes: predicted peak of one device.
        reason: why, in a few words.
    """

    settings: PlanSettings
    peak_bytes: int
    reason: str


def choose_auto_settings(
    recipe: "Recipe", planner: "Planner", settings: PlanSettings, device_memory: int
) -> tuple[PlanSettings, tuple[AutoSetting, ...]]:
    """Choose gradient checkpointing and micro-batch size where the recipe does not.

    Args:
        recipe: the recipe.
        planner: predicts memory.
        settings: the recipe's settings.
        device_memory: bytes of one device.

    Returns:
        The complete settings, and the chosen ones.
    """
    rows = recipe.training.global_batch_size
    auto_settings = []
    if rows is not None:
        # A batch of one decides whether checkpointing is needed.
        settings = settings.with_changes(batch=1, accumulation=max(1, rows // settings.processes))
    if recipe.training.gradient_checkpointing is None:
        if _supports_checkpointing(recipe):
            chosen = choose_checkpointing(planner, settings, device_memory)
            settings, reason = chosen.settings, chosen.reason
        else:
            reason = "not supported by this variant"
        auto_settings.append(
            AutoSetting("training.gradient_checkpointing", "true" if settings.checkpointing else "false", reason)
        )
    if rows is not None:
        chosen = choose_batch(planner, settings, device_memory, MAX_TOKENS_PER_PASS[settings.device])
        settings = chosen.settings
        value = f"{settings.batch}, {settings.accumulation} accumulated"
        auto_settings.append(AutoSetting("training.per_device_train_batch_size", value, chosen.reason))
    return settings, tuple(auto_settings)


def _supports_checkpointing(recipe: "Recipe") -> bool:
    return recipe.adapter is None or recipe.adapter.incompatibility("checkpointing") is None


def choose_checkpointing(planner: "Planner", settings: PlanSettings, device_memory: int) -> ChosenSettings:
    """Choose gradient checkpointing only if the run does not fit without it.

    Args:
        planner: predicts memory.
        settings: all other settings.
        device_memory: bytes of one device.
    """
    available = format_bytes(device_memory)
    without = settings.with_changes(checkpointing=False)
    most = upper_bound(planner, without)
    if most <= AMPLE * device_memory:
        return ChosenSettings(
            without, most, f"fits without checkpointing: less than {format_bytes(most)} of {available}"
        )
    peak = planner.memory(without).total
    if peak <= MARGIN * device_memory:
        return ChosenSettings(
            without, peak, f"fits without checkpointing: {format_bytes(peak)} of {format_bytes(device_memory)}"
        )
    checkpointed = settings.with_changes(checkpointing=True)
    checkpointed_peak = planner.memory(checkpointed).total
    if checkpointed_peak >= peak:
        return ChosenSettings(without, peak, f"checkpointing would not help: {format_bytes(peak)} of {available}")
    return ChosenSettings(
        checkpointed,
        checkpointed_peak,
        f"{format_bytes(peak)} without checkpointing, {format_bytes(checkpointed_peak)} with it, of {available}",
    )


def upper_bound(planner: "Planner", settings: PlanSettings) -> int:
    """Return more bytes than a run without checkpointing takes, without tracing it.

    It counts every weight as trained by Adam in float32, and the input and output of every linear layer as kept in
    float32 beside eight more tensors of the model's width in each block. Half as much again is for adapters.
    """
    counts = planner.counts
    tokens = settings.tokens
    block = 8 * counts.hidden_size
    if settings.attention != "fused":
        block += 4 * counts.num_heads * settings.length
    kept = 4 * tokens * (2 * counts.linear_outputs + counts.num_layers * block)
    # The head, its gradient and its copies, and some chunks of logits.
    head = 12 * counts.vocab_size * counts.hidden_size + _LOGITS
    return round(1.5 * (16 * counts.parameters + kept + head))


def choose_batch(planner: "Planner", settings: PlanSettings, device_memory: int, max_tokens: int) -> ChosenSettings:
    """Choose the largest micro-batch that fits.

    The number of examples per optimizer step does not change.

    Args:
        planner: predicts memory.
        settings: all other settings; `batch * accumulation` stays the same.
        device_memory: bytes of one device.
        max_tokens: the most tokens per forward pass.
    """
    examples = settings.batch * settings.accumulation
    fitting = largest_batch(planner, settings, int(MARGIN * device_memory))
    most = max(1, min(examples, fitting, max_tokens // settings.length))
    # Only divisors keep the examples per optimizer step exact.
    batch = next(count for count in range(most, 0, -1) if examples % count == 0)
    chosen = settings.with_changes(batch=batch, accumulation=examples // batch)
    peak = planner.memory(chosen).total
    memory = f"{format_bytes(peak)} of {format_bytes(device_memory)}"
    reason = f"{batch} x {settings.length} tokens per pass, {examples // batch} accumulated: {memory}"
    return ChosenSettings(chosen, peak, reason)


def choose_rate(recipe: "Recipe", *, resume: bool = False) -> "tuple[Recipe, tuple[AutoSetting, ...]]":
    """Choose the learning rate where the recipe says `auto`.

    Args:
        recipe: the recipe.
        resume: keep the rate of the run that its folder holds, which may have been planned for other steps.

    Returns:
        The recipe with a number, and the chosen setting.

    Raises:
        UserError: the width of the model cannot be read.
    """
    if recipe.training.learning_rate != "auto":
        return recipe, ()
    before = _started_recipe(recipe) if resume else None
    started = None if before is None else before.training.learning_rate
    if started is not None and started != "auto":
        value, reason = started, "the rate that the run was started with"
    else:
        rule = rule_rate(recipe)
        value, reason = rule.value, rule.reason
    training = recipe.training.model_copy(update={"learning_rate": value})
    setting = AutoSetting("training.learning_rate", format_rate(value), reason)
    return recipe.model_copy(update={"training": training}), (setting,)


def _started_recipe(recipe: "Recipe") -> "Recipe | None":
    """Return the recipe that the run in the folder was started with; None if none was."""
    run_folder = RunFolder(Path(recipe.output_dir))
    if not run_folder.has_started:
        return None
    return load_recipe(run_folder.recipe, to_train=False, upgrade=True).recipe


def _with_compute_dtype(
    recipe: "Recipe", distributed: "DistributedSetup", *, resume: bool
) -> "tuple[Recipe, tuple[AutoSetting, ...]]":
    """Choose the compute dtype; a resumed run keeps that of its start, or its numbers would change."""
    before = _started_recipe(recipe) if resume and recipe.model.compute_dtype == "auto" else None
    if before is not None:
        setting = AutoSetting(COMPUTE_DTYPE, before.model.computed_in, "the one that the run was started with")
    elif distributed.gpus:
        return recipe, ()
    else:
        return planned_compute_dtype(recipe, this_cpu(distributed.processes), sharded=distributed.uses_deepspeed)
    is_news = setting.value != recipe.model.dtype
    return _computing_in(recipe, setting), (setting,) if is_news else ()


def planned_compute_dtype(
    recipe: "Recipe", hardware: Hardware, *, sharded: bool
) -> "tuple[Recipe, tuple[AutoSetting, ...]]":
    """Choose the compute dtype of a recipe on a device.

    Args:
        recipe: the recipe.
        hardware: the device.
        sharded: whether DeepSpeed shards the run.

    Returns:
        The recipe with it, and the setting if one was chosen.
    """
    found = choose_compute_dtype(recipe, ModelSource.of_recipe(recipe).config(), hardware, sharded=sharded)
    return (recipe, ()) if found is None else (_computing_in(recipe, found), (found,))


def _computing_in(recipe: "Recipe", setting: AutoSetting) -> "Recipe":
    model = recipe.model.model_copy(update={"compute_dtype": setting.value})
    return recipe.model_copy(update={"model": model})


def resolve_auto_settings(
    loaded: "LoadedRecipe", distributed: "DistributedSetup", *, resume: bool = False
) -> "tuple[LoadedRecipe, tuple[AutoSetting, ...]]":
    """Choose the settings that the recipe leaves open.

    Args:
        loaded: the recipe.
        distributed: the processes of the run.
        resume: whether the run that its folder holds is to go on.

    Returns:
        The recipe with every value set, and the chosen settings.

    Raises:
        UserError: the global batch size is not divisible by the number of processes, or the width of the model cannot
            be read.
    """
    recipe, chosen_rate = choose_rate(loaded.recipe, resume=resume)
    recipe, chosen_dtype = _with_compute_dtype(recipe, distributed, resume=resume)
    chosen = (*chosen_rate, *chosen_dtype)
    training = recipe.training
    if training.gradient_checkpointing is not None and training.global_batch_size is None:
        return replace(loaded, recipe=recipe), chosen
    _check_divisible(loaded, distributed.world_size)
    hardware = this_machine(distributed.processes)
    planner = Planner(ModelSource.of_recipe(recipe).config(), recipe)
    settings, auto_settings = choose_auto_settings(
        recipe, planner, settings_for(recipe, hardware, None, distributed), hardware.memory
    )
    values: dict[str, Any] = {"gradient_checkpointing": settings.checkpointing}
    if training.global_batch_size is not None:
        values |= {
            "per_device_train_batch_size": settings.batch,
            "gradient_accumulation_steps": settings.accumulation,
            "global_batch_size": None,
        }
    complete = recipe.model_copy(update={"training": training.model_copy(update=values)})
    return replace(loaded, recipe=complete), (*chosen, *auto_settings)


def _check_divisible(loaded: "LoadedRecipe", processes: int) -> None:
    """Check that the examples of a step can be divided evenly among the processes."""
    rows = loaded.recipe.training.global_batch_size
    if rows is not None and rows % processes:
        raise UserError(
            f"{rows} examples per step cannot be divided among {processes} processes",
            where=loaded.where("training", "global_batch_size"),
            hint=f"Use a multiple of {processes}.",
        )
