"""Time and money: arithmetic of the run over what the device can do, with every assumption named."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.models.source import ModelSource
from peftchat.planning.auto_settings import choose_open_settings
from peftchat.planning.hardware import Hardware
from peftchat.planning.memory import MemoryPlan
from peftchat.planning.parameter_counts import ParameterCounts, TrainableCounts
from peftchat.planning.planner import (
    Change,
    GridCell,
    Planner,
    alternatives,
    changes,
    cheapest_change,
    largest_batch,
    largest_length,
)
from peftchat.planning.settings import DatasetSize, PlanSettings, read_dataset_size, settings_on, steps_of
from peftchat.training.throughput import training_flops

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


_UTILIZATION = {"full": 0.40, "lora": 0.35, "qlora": 0.25}
"""Share of the matrix rate that training reaches on a GPU, model FLOPs only; a careful guess for each method."""

_UTILIZATION_ON_CPU = 0.20


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What a run takes.

    Attributes:
        tokens: worked through, padding included.
        steps: optimizer steps.
        flops: floating-point operations of the model, recomputation not counted.
        tflops: matrix rate of one device, in 10^12 operations a second.
        utilization: assumed share of it.
        seconds: of training, without loading, evaluation and saving.
        money: at the given price, None without one.
        assumptions: in words.
    """

    tokens: int
    steps: int
    flops: float
    tflops: float
    utilization: float
    seconds: float
    money: float | None
    assumptions: tuple[str, ...]


def cost_estimate(
    settings: "PlanSettings",
    facts: "ParameterCounts",
    trained: "TrainableCounts",
    hardware: "Hardware",
    *,
    tokens: int,
    steps: int,
    tflops: float,
    price: float | None,
) -> CostEstimate:
    """Estimate time and money.

    Args:
        tokens: of the whole run, over all devices.
        steps: optimizer steps of the whole run.
        tflops: matrix rate of one device.
        price: of one device for an hour, in any currency.
    """
    full = settings.method == "full"
    body = facts.linear + (0 if full else trained.parameters)
    flops = training_flops(
        body=body,
        head=facts.head_size,
        trained_body=min(trained.parameters, body),
        trains_head=full,
        tokens=tokens,
        supervised=round(tokens * settings.supervised),
    ) + _attention_flops(settings, facts, tokens)
    done = flops * (1.33 if settings.checkpointing else 1.0)
    share = _UTILIZATION[settings.method] if settings.device == "cuda" else _UTILIZATION_ON_CPU
    # Processes on one processor share its cores.
    devices = hardware.count if settings.device == "cuda" else 1
    seconds = done / (tflops * 1e12 * share * devices)
    money = None if price is None else price * seconds / 3600 * hardware.count
    return CostEstimate(
        tokens, steps, flops, tflops, share, seconds, money, _assumptions(settings, hardware, share, tflops)
    )


def _attention_flops(settings: "PlanSettings", facts: "ParameterCounts", tokens: int) -> float:
    """Scores and weighted sums over the keys a query sees: half of its conversation, or all positions under a mask."""
    within = settings.attention == "fused"
    seen = min(settings.conversation, settings.length) / 2 if within else settings.length
    return 12.0 * facts.layers * facts.hidden * seen * tokens


def _assumptions(settings: "PlanSettings", hardware: "Hardware", share: float, tflops: float) -> tuple[str, ...]:
    told = [f"{share:.0%} of {tflops:,.3g} TFLOP/s in use ({hardware.label})"]
    if settings.checkpointing:
        told.append("a third more arithmetic for checkpointing")
    if hardware.count > 1 and settings.device == "cuda":
        told.append(f"{hardware.count} devices work at the speed of {hardware.count}: communication is hidden")
    if settings.offload != "none":
        told.append("offloading costs nothing, which it does")
    told.append("loading, evaluation and saving not counted")
    return tuple(told)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
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
    facts: ParameterCounts
    trained: TrainableCounts
    settings: PlanSettings
    hardware: Hardware
    memory: MemoryPlan
    largest_batch: int
    largest_length: int
    changes: Sequence[Change]
    cheapest: Change | None
    grid: Sequence[GridCell]
    cost: CostEstimate | None
    workload: DatasetSize | None
    unread: str | None
    estimated: bool
    chosen: Sequence[str]

    @property
    def fits(self) -> bool:
        """Whether the recipe as it is fits the device."""
        return self.memory.total <= self.hardware.memory


def plan_training(
    recipe: "Recipe", hardware: Hardware, *, price: float | None = None, with_grid: bool = True, read_data: bool = True
) -> TrainingPlan:
    """Plan a run of the recipe on a device.

    Args:
        hardware: the device, and how many of them.
        price: of one device for an hour.
        with_grid: also look at every other method, sharding and checkpointing.
        read_data: encode local data for exact lengths.

    Raises:
        UserError: the config cannot be read, or the adapter does not fit the model.
    """
    found = read_dataset_size(recipe) if read_data else "not asked for"
    workload = found if isinstance(found, DatasetSize) else None
    planner = Planner(ModelSource.of_recipe(recipe).config(), recipe)
    room = hardware.memory
    settings, choices = choose_open_settings(recipe, planner, settings_on(recipe, hardware, workload), room)
    memory = planner.memory(settings)
    fits = memory.total <= room
    return TrainingPlan(
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
        cost=_plan_cost(recipe, planner, settings, hardware, workload, price),
        workload=workload,
        unread=None if isinstance(found, DatasetSize) else found,
        estimated=planner.estimated,
        chosen=tuple(f"{choice.key}: {choice.reason}" for choice in choices),
    )


def _plan_cost(
    recipe: "Recipe",
    planner: Planner,
    settings: PlanSettings,
    hardware: Hardware,
    workload: DatasetSize | None,
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
