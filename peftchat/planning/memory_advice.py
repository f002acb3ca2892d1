"""Memory advice: what a run that ran out of memory could change, by the plan, the cheapest change first."""

from typing import TYPE_CHECKING

from peftchat.formatting import format_bytes
from peftchat.models.source import ModelSource
from peftchat.planning.hardware import this_machine
from peftchat.planning.planner import Change, Planner, changes
from peftchat.planning.settings import settings_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peftchat.planning.memory import Phase
    from peftchat.recipe import Recipe
    from peftchat.training.distributed import DistributedSetup
    from peftchat.training.position import Part, Position

_PHASES: "Mapping[Part, Phase]" = {
    "loading the model": "loading",
    "the checks before the first step": "forward",
    "the forward pass": "forward",
    "the backward pass": "backward",
    "the optimizer's update": "step",
}
"""What the plan predicts for what a run was doing."""

_WORTH = 0.95
"""A change that leaves more than this share of the memory is not worth its cost."""


def memory_advice(recipe: "Recipe", distributed: "DistributedSetup", position: "Position") -> str:
    """Return what to change, in sentences that begin with a blank; nothing where the plan knows nothing.

    Args:
        recipe: the run's recipe.
        distributed: the processes of the run.
        position: where memory ran out.
    """
    training = recipe.training
    if position.part == "the evaluation":
        if training.per_device_eval_batch_size > 1:
            return " Add `--set training.per_device_eval_batch_size=1`; the held-out loss does not depend on it."
        return " Lower data.max_length, or evaluate in a smaller precision (model.dtype)."
    if position.part not in _PHASES:
        return ""
    phase = _PHASES[position.part]
    hardware = this_machine(distributed.processes)
    planner = Planner(ModelSource.of_recipe(recipe).config(), recipe)
    settings = planner.with_own_attention(settings_for(recipe, hardware, None, distributed))
    before = planner.memory(settings).phases[phase]
    saving = [one for one in changes(planner, settings) if one.memory.phases[phase] < before]
    if not saving:
        return f" By the plan, {position.part} takes {format_bytes(before)}, and no change of settings lowers it."
    # Changes that hardly save anything, and those that do not suffice by the plan, come last.
    saving.sort(key=lambda one: one.memory.total > hardware.memory)
    worth = [one for one in saving if one.memory.phases[phase] < _WORTH * before]
    chosen = worth[0] if worth else min(saving, key=lambda one: one.memory.phases[phase])
    told = _told(chosen, before, phase)
    if distributed.world_size == 1 and training.on_oom == "stop" and phase in ("forward", "backward"):
        told += " `--set training.on_oom=halve` does such steps again in smaller micro-batches."
    return told


def _told(change: Change, before: int, phase: "Phase") -> str:
    flags = " ".join(f"--set {flag}" for flag in change.flags)
    bytes_there = f"{format_bytes(change.memory.phases[phase])} instead of {format_bytes(before)} there"
    return f" By the plan the cheapest change is {change.name} ({change.costs}): {bytes_there}. Add `{flags}`."
