"""Training plan: the memory, time and cost of a recipe on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.models.source import ModelSource
from peftchat.planning.auto_settings import choose_auto_settings, choose_rate, planned_compute_dtype
from peftchat.planning.hardware import Hardware
from peftchat.planning.memory import MemoryPlan
from peftchat.planning.pairs import passes_without_gradient
from peftchat.planning.parameter_counts import ParameterCounts, TrainableCounts
from peftchat.planning.planner import (
    Change,
    GridCell,
    Planner,
    alternatives,
    changes,
    cheapest_fix,
    largest_batch,
    largest_length,
    pair_layout,
)
from peftchat.planning.settings import DatasetSize, PlanSettings, read_dataset_size, settings_for, total_steps
from peftchat.training.hints import RunSize, find_hints
from peftchat.training.throughput import attention_flops, training_flops

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


_UTILIZATION = {"full": 0.40, "lora": 0.35, "qlora": 0.25}
"""Fraction of the peak matrix rate that training reaches on a GPU; a conservative estimate for each method."""

_UTILIZATION_ON_CPU = 0.20


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """The time and cost of a run.

    Attributes:
        tokens: tokens of all steps, with padding.
        steps: optimizer steps.
        flops: floating-point operations of the model, without recomputation.
        tflops: matrix rate of one device, in 10^12 operations per second.
        utilization: the assumed fraction of it.
        seconds: training time, without loading, evaluation and saving.
        money: the cost at the given price; None without one.
        assumptions: one phrase each.
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
    counts: "ParameterCounts",
    trainable: "TrainableCounts",
    hardware: "Hardware",
    *,
    tokens: int,
    steps: int,
    tflops: float,
    price: float | None,
    without_gradient: int = 0,
) -> CostEstimate:
    """Estimate time and cost.

    Args:
        settings: the settings of the run.
        counts: the parameters of the model.
        trainable: the parameters that are trained.
        hardware: the devices.
        tokens: tokens of the run, over all devices.
        steps: optimizer steps of the run.
        tflops: matrix rate of one device, in 10^12 operations per second.
        price: the price of one device per hour, in any currency.
        without_gradient: tokens of the run in passes without a gradient, such as those of a reference.
    """
    full = settings.method == "full"
    # A token passes some of the experts alone, and their adapters alone.
    body = counts.linear + counts.active_experts + (0 if full else trainable.active)
    flops = training_flops(
        body=body,
        head=counts.lm_head_size,
        trained_body=min(trainable.active, body),
        trains_head=full,
        tokens=tokens,
        supervised=round(tokens * settings.supervised),
    ) + _attention_flops(settings, counts, tokens)
    executed = flops * (1.33 if settings.checkpointing else 1.0)
    executed += 2.0 * (body + counts.lm_head_size * settings.supervised) * without_gradient
    utilization = _UTILIZATION[settings.method] if settings.device == "cuda" else _UTILIZATION_ON_CPU
    # Processes on one CPU share its cores.
    devices = hardware.count if settings.device == "cuda" else 1
    seconds = executed / (tflops * 1e12 * utilization * devices)
    money = None if price is None else price * seconds / 3600 * hardware.count
    return CostEstimate(
        tokens, steps, flops, tflops, utilization, seconds, money, _assumptions(settings, hardware, utilization, tflops)
    )


def _attention_flops(settings: "PlanSettings", counts: "ParameterCounts", tokens: int) -> float:
    """Count the operations of attention.

    They cover half of the pairs in a conversation, or all pairs of positions with a mask.
    """
    fused = settings.attention == "fused"
    keys = min(settings.conversation, settings.length) / 2 if fused else settings.length
    return attention_flops(layers=counts.num_layers, width=counts.hidden_size, pairs=keys * tokens)


def _assumptions(settings: "PlanSettings", hardware: "Hardware", utilization: float, tflops: float) -> tuple[str, ...]:
    assumptions = [f"{utilization:.0%} of {tflops:,.3g} TFLOP/s ({hardware.label})"]
    if settings.checkpointing:
        assumptions.append("a third more computation for checkpointing")
    if hardware.count > 1 and settings.device == "cuda":
        assumptions.append(f"communication among {hardware.count} devices costs no time")
    if settings.unit != "sequences":
        assumptions.append("passes of a reference and of a KL term included")
    if settings.offload != "none":
        assumptions.append("offloading costs no time (it does)")
    assumptions.append("loading, evaluation and saving are not included")
    return tuple(assumptions)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A recipe on a device: what it takes, whether it fits, and the alternatives.

    Attributes:
        model: the model's name.
        counts: its parameters.
        trainable: the parameters that are trained.
        settings: the settings of the run.
        hardware: the device.
        memory: the predicted peak.
        largest_batch: the largest batch of a forward pass that fits.
        largest_length: the longest sequence that fits at the recipe's batch, in tokens.
        changes: single changes that save memory.
        cheapest_fix: the cheapest change that makes it fit; None if it fits or nothing does.
        grid: other combinations of method, sharding strategy and checkpointing.
        cost: time and cost; None if the number of steps is unknown.
        dataset: the size of the data, if it was read.
        unread_reason: why the data was not read.
        estimated: whether activations are estimated, because the architecture could not be traced.
        auto_settings: the settings that the recipe leaves open, with the reason of each choice.
        hints: what published evidence warns of.
    """

    model: str
    counts: ParameterCounts
    trainable: TrainableCounts
    settings: PlanSettings
    hardware: Hardware
    memory: MemoryPlan
    largest_batch: int
    largest_length: int
    changes: Sequence[Change]
    cheapest_fix: Change | None
    grid: Sequence[GridCell]
    cost: CostEstimate | None
    dataset: DatasetSize | None
    unread_reason: str | None
    estimated: bool
    auto_settings: Sequence[str]
    hints: Sequence[str]

    @property
    def fits(self) -> bool:
        """Whether the recipe fits the device."""
        return self.memory.total <= self.hardware.memory

    def checkpoint_bytes(self, recipe: "Recipe") -> int:
        """Return the disk that checkpoints take at most: weights in float32 and AdamW's two moments, and one more."""
        trained = self.trainable.parameters + self.trainable.new_token_parameters
        return trained * (4 + 8) * ((recipe.training.save_total_limit or 1) + 1)


@dataclass(frozen=True)
class Prediction:
    """The memory of a recipe on a device, before anything else is searched.

    Attributes:
        recipe: the recipe, with its learning rate chosen.
        hardware: the device.
        planner: predicts the memory of other settings.
        settings: the settings of the run.
        memory: the predicted peak.
        dataset: the size of the data, if it was read.
        unread_reason: why the data was not read.
        auto_settings: the settings that the recipe leaves open, with the reason of each choice.
    """

    recipe: "Recipe"
    hardware: Hardware
    planner: Planner
    settings: PlanSettings
    memory: MemoryPlan
    dataset: DatasetSize | None
    unread_reason: str | None
    auto_settings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the recipe fits the device."""
        return self.memory.total <= self.hardware.memory


def predict(recipe: "Recipe", hardware: Hardware, *, read_data: bool = True) -> Prediction:
    """Predict the memory of a run of the recipe on a device.

    Args:
        recipe: the recipe.
        hardware: the device, and how many of them.
        read_data: whether to encode local data for exact lengths.

    Raises:
        UserError: the config cannot be read, or the adapter does not fit the model.
    """
    recipe, chosen_rate = choose_rate(recipe)
    recipe, chosen_dtype = planned_compute_dtype(recipe, hardware, sharded=settings_for(recipe, hardware, None).sharded)
    config = ModelSource.of_recipe(recipe).config()
    layout = pair_layout(recipe, hardware.device, config)
    found = read_dataset_size(recipe, layout) if read_data else "not requested"
    dataset = found if isinstance(found, DatasetSize) else None
    planner = Planner(config, recipe)
    on_device = planner.with_own_attention(settings_for(recipe, hardware, dataset, layout=layout))
    settings, chosen = choose_auto_settings(recipe, planner, on_device, hardware.memory)
    return Prediction(
        recipe=recipe,
        hardware=hardware,
        planner=planner,
        settings=settings,
        memory=planner.memory(settings),
        dataset=dataset,
        unread_reason=None if isinstance(found, DatasetSize) else found,
        auto_settings=tuple(str(setting) for setting in (*chosen_rate, *chosen_dtype, *chosen)),
    )


def plan_training(
    recipe: "Recipe", hardware: Hardware, *, price: float | None = None, with_grid: bool = True, read_data: bool = True
) -> TrainingPlan:
    """Plan a run of the recipe on a device.

    Args:
        recipe: the recipe.
        hardware: the device, and how many of them.
        price: the price of one device per hour.
        with_grid: whether to predict every other method, sharding strategy and checkpointing.
        read_data: whether to encode local data for exact lengths.

    Raises:
        UserError: the config cannot be read, or the adapter does not fit the model.
    """
    found = predict(recipe, hardware, read_data=read_data)
    recipe, planner, settings, dataset = found.recipe, found.planner, found.settings, found.dataset
    device_memory = hardware.memory
    return TrainingPlan(
        model=recipe.model.name,
        counts=planner.counts,
        trainable=planner.trainable(settings),
        settings=settings,
        hardware=hardware,
        memory=found.memory,
        largest_batch=largest_batch(planner, settings, device_memory),
        largest_length=largest_length(planner, settings, device_memory),
        changes=changes(planner, settings),
        cheapest_fix=None if found.fits else cheapest_fix(planner, settings, device_memory),
        grid=alternatives(planner, settings, device_memory) if with_grid else (),
        cost=_plan_cost(recipe, planner, settings, hardware, dataset, price),
        dataset=dataset,
        unread_reason=found.unread_reason,
        estimated=planner.estimated,
        hints=planned_hints(recipe, planner, settings, dataset),
        auto_settings=found.auto_settings,
    )


def planned_hints(
    recipe: "Recipe", planner: Planner, settings: PlanSettings, dataset: DatasetSize | None
) -> tuple[str, ...]:
    """Return what published evidence warns of.

    Args:
        recipe: the recipe.
        planner: counts its trainable parameters.
        settings: its settings on the device.
        dataset: the size of the data, if it was read.
    """
    trainable = planner.trainable(settings)
    size = RunSize(trainable.parameters, trainable.attention_only)
    if dataset is not None:
        steps = total_steps(recipe, dataset, settings) or 0
        size = RunSize.of_steps(
            trainable.parameters,
            attention_only=trainable.attention_only,
            supervised_tokens=round(dataset.tokens * dataset.supervised),
            conversations=dataset.conversations,
            sequences=dataset.sequences,
            sequences_per_step=settings.batch * settings.accumulation * settings.processes,
            steps=steps,
        )
    return find_hints(recipe, size)


def _plan_cost(
    recipe: "Recipe",
    planner: Planner,
    settings: PlanSettings,
    hardware: Hardware,
    dataset: DatasetSize | None,
    price: float | None,
) -> CostEstimate | None:
    steps = total_steps(recipe, dataset, settings)
    if steps is None:
        return None
    per_step = settings.batch * settings.accumulation * settings.processes
    tokens = steps * per_step * settings.rows * settings.length
    if dataset is not None:
        tokens = min(tokens, round(steps * per_step * dataset.tokens / dataset.sequences))
    return cost_estimate(
        settings,
        planner.counts,
        planner.trainable(settings),
        hardware,
        tokens=tokens,
        steps=steps,
        tflops=hardware.tflops or _measured_rate(settings),
        price=price,
        without_gradient=passes_without_gradient(recipe, tokens, None if dataset is None else dataset.tokens),
    )


def _measured_rate(settings: PlanSettings) -> float:
    """Measure the matrix rate of this machine, if no data sheet gives it."""
    import torch

    from peftchat.training.throughput import measure_matmul_flops

    return measure_matmul_flops(torch.device(settings.device), getattr(torch, settings.dtype)) / 1e12
