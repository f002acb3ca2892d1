"""A whole plan: from a recipe and a device to everything that `peftchat plan` tells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.models.loading import load_config
from peftchat.planning.automatic import choose_open
from peftchat.planning.cost import CostEstimate, cost_estimate
from peftchat.planning.facts import ModelFacts, TrainedFacts
from peftchat.planning.grid import Cell, alternatives
from peftchat.planning.hardware import Hardware
from peftchat.planning.memory import MemoryPlan
from peftchat.planning.planner import Planner
from peftchat.planning.search import Change, changes, cheapest_change, largest_batch, largest_length
from peftchat.planning.settings import PlanSettings, attention_kind, plan_settings
from peftchat.planning.workload import Workload, read_workload, steps_of

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.training.distributed import DistributedSetup, Strategy


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found out about a recipe on a device.

    Attributes:
        model: the model's name.
        facts: its counts.
        trained: what is trained of it or beside it.
        settings: the recipe's settings.
        hardware: the device.
        memory: the predicted peak.
        largest_batch: rows in one forward pass that fit.
        largest_length: tokens of a row that fit at the recipe's batch.
        changes: single changes that save memory.
        cheapest: what makes it fit, where it does not.
        grid: other ways to train the model.
        cost: time and money, where the work is known.
        workload: the data, where it was read.
        unread: why it was not.
        estimated: whether activations are a rule of thumb, because the architecture could not be traced.
        chosen: what the recipe leaves open, as training would settle it, with the reason.
    """

    model: str
    facts: ModelFacts
    trained: TrainedFacts
    settings: PlanSettings
    hardware: Hardware
    memory: MemoryPlan
    largest_batch: int
    largest_length: int
    changes: Sequence[Change]
    cheapest: Change | None
    grid: Sequence[Cell]
    cost: CostEstimate | None
    workload: Workload | None
    unread: str | None
    estimated: bool
    chosen: Sequence[str]

    @property
    def fits(self) -> bool:
        """Whether the recipe as it is fits the device."""
        return self.memory.total <= self.hardware.memory


def make_plan(
    recipe: "Recipe", hardware: Hardware, *, price: float | None = None, with_grid: bool = True, read_data: bool = True
) -> Plan:
    """Plan a run of the recipe on a device.

    Args:
        hardware: the device, and how many of them.
        price: of one device for an hour.
        with_grid: also look at every other method, sharding and checkpointing.
        read_data: encode local data for exact lengths.

    Raises:
        InputError: the config cannot be read, or the adapter does not fit the model.
    """
    found = read_workload(recipe) if read_data else "not asked for"
    workload = found if isinstance(found, Workload) else None
    planner = Planner(load_config(recipe, need_weights=False), recipe)
    room = hardware.memory
    settings, choices = choose_open(recipe, planner, settings_on(recipe, hardware, workload), room)
    memory = planner.memory(settings)
    fits = memory.total <= room
    return Plan(
        model=recipe.model.name,
        facts=planner.facts,
        trained=planner.trained(settings),
        settings=settings,
        hardware=hardware,
        memory=memory,
        largest_batch=largest_batch(planner, settings, room),
        largest_length=largest_length(planner, settings, room),
        changes=changes(planner, settings),
        cheapest=None if fits else cheapest_change(planner, settings, room),
        grid=alternatives(planner, settings, room) if with_grid else (),
        cost=_cost(recipe, planner, settings, hardware, workload, price),
        workload=workload,
        unread=None if isinstance(found, Workload) else found,
        estimated=planner.estimated,
        chosen=tuple(f"{choice.key}: {choice.reason}" for choice in choices),
    )


def settings_on(
    recipe: "Recipe", hardware: Hardware, workload: Workload | None, placement: "DistributedSetup | None" = None
) -> PlanSettings:
    """The recipe's settings on a device.

    Args:
        hardware: the device, which need not be here.
        workload: the data, where it was read.
        placement: where a run takes place; without it, what training would make of that many such devices.
    """
    if placement is None:
        strategy, processes = _placed(recipe, hardware)
    else:
        strategy, processes = placement.strategy, placement.world_size
    dialogue = None if workload is None else workload.dialogue
    return plan_settings(
        recipe,
        strategy=strategy,
        processes=processes,
        device=hardware.device,
        attention=attention_kind(recipe, hardware.device),
        longest=None if workload is None else workload.longest,
        supervised=None if workload is None else workload.supervised,
        dialogue=dialogue,
        new_tokens=None if workload is None else workload.new_tokens,
    )


def _placed(recipe: "Recipe", hardware: Hardware) -> "tuple[Strategy, int]":
    wanted = recipe.distributed.strategy
    if wanted == "single":
        return "single", 1
    processes = hardware.count
    if wanted != "auto":
        return wanted, processes
    if processes == 1:
        return "single", 1
    return ("zero3" if recipe.method == "full" else "ddp"), processes


def _cost(
    recipe: "Recipe",
    planner: Planner,
    settings: PlanSettings,
    hardware: Hardware,
    workload: Workload | None,
    price: float | None,
) -> CostEstimate | None:
    steps = steps_of(recipe, workload, settings)
    if steps is None:
        return None
    per_step = settings.batch * settings.accumulation * settings.processes
    tokens = steps * per_step * settings.length
    if workload is not None:
        tokens = min(tokens, round(steps * per_step * workload.tokens / workload.sequences))
    return cost_estimate(
        settings,
        planner.facts,
        planner.trained(settings),
        hardware,
        tokens=tokens,
        steps=steps,
        tflops=hardware.tflops or _measured_rate(settings),
        price=price,
    )


def _measured_rate(settings: PlanSettings) -> float:
    """The matrix rate of this machine, where no data sheet tells it."""
    import torch

    from peftchat.training.throughput import measure_matmul_flops

    return measure_matmul_flops(torch.device(settings.device), getattr(torch, settings.dtype)) / 1e12
