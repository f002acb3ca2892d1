"""Planner: predict memory, search what fits, and list the alternatives."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.models.loading import VARLEN
from peftchat.planning.activations import (
    ActivationProfile,
    LossProfile,
    TraceConfig,
    activation_profile,
    estimated_profile,
    loss_profile,
)
from peftchat.planning.hardware import Device
from peftchat.planning.memory import MemoryPlan, memory_plan
from peftchat.planning.pairs import PairLayout
from peftchat.planning.parameter_counts import ParameterCounts, TrainableCounts, parameter_counts, trainable_counts
from peftchat.planning.settings import PlanSettings, attention_kind
from peftchat.planning.tracing import needs_eager_attention
from peftchat.training.shared_prompts import can_share_prompts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftchat.recipe import Recipe
    from peftchat.recipe.sections import Method
    from peftchat.training.distributed import Strategy


def pair_layout(recipe: "Recipe", device: Device, config: "PretrainedConfig") -> PairLayout:
    """Return how training lays out pairs; a labeled answer is one of a line or of a row.

    `peftchat.training.model` selects the attention, and `peftchat.training.shared_prompts` what is shared.

    Args:
        recipe: the recipe.
        device: `cuda` or `cpu`.
        config: the base's.
    """
    if attention_kind(recipe, device) != "fused" or needs_eager_attention(config):
        return "rows"
    is_own = recipe.model.attention in ("auto", VARLEN)
    shares = is_own and not recipe.has_labels and can_share_prompts(config, recipe.data.max_length)
    return "shared" if shares else "lines"


@dataclass(frozen=True, slots=True)
class GridCell:
    """One combination of method, sharding strategy and checkpointing.

    Attributes:
        settings: with the recipe's own batch and length.
        peak_bytes: predicted peak of one device.
        fits: whether the device has that much memory.
        largest_batch: the largest batch of a forward pass that fits.
    """

    settings: PlanSettings
    peak_bytes: int
    fits: bool
    largest_batch: int


_METHODS: tuple[tuple[Literal["full", "lora", "qlora"], Literal[4, 8] | None], ...] = (
    ("full", None),
    ("lora", None),
    ("qlora", 8),
    ("qlora", 4),
)


def alternatives(planner: "Planner", settings: PlanSettings, device_memory: int) -> Sequence[GridCell]:
    """Return every combination that the recipe's variant supports.

    The most expensive method comes first.
    """
    cells = []
    for method, bits in _METHODS:
        weights = "unquantized" if bits is None else f"{bits} bits"
        if method != "full" and not planner.supports(weights):
            continue
        for strategy in _strategies(settings, method, bits):
            if method != "full" and not planner.supports(strategy):
                continue
            for checkpointing in (False, True):
                other = settings.with_changes(
                    method=method,
                    bits=bits,
                    double=bits == 4 and (settings.double or settings.bits is None),
                    strategy=strategy,
                    checkpointing=checkpointing,
                    offload=settings.offload if strategy == settings.strategy else "none",
                )
                peak = planner.memory(other).total
                cells.append(GridCell(other, peak, peak <= device_memory, largest_batch(planner, other, device_memory)))
    return cells


def _strategies(settings: PlanSettings, method: str, bits: int | None) -> "Iterator[Strategy]":
    if settings.processes == 1:
        yield "single"
        return
    yield "ddp"
    yield "zero2"
    # ZeRO-3 cannot shard 8-bit weights.
    if bits != 8:
        yield "zero3"


_MAX_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Change:
    """A change of settings that saves memory.

    Attributes:
        name: the change, in a few words.
        costs: its disadvantage.
        flags: overrides for `--set`.
        settings: the changed settings.
        memory: the peak with them.
    """

    name: str
    costs: str
    flags: tuple[str, ...]
    settings: PlanSettings
    memory: MemoryPlan


def largest_batch(planner: "Planner", settings: PlanSettings, device_memory: int) -> int:
    """Return the largest batch of a forward pass that fits; 0 if none does."""
    return _largest(lambda batch: planner.memory(settings.with_changes(batch=batch)).total <= device_memory, _MAX_BATCH)


def largest_length(planner: "Planner", settings: PlanSettings, device_memory: int) -> int:
    """Return the longest sequence that fits, in steps of 64 tokens.

    It is limited by model and memory; 0 if none fits.
    """

    def fits(blocks: int) -> bool:
        return planner.memory(settings.with_changes(length=64 * blocks)).total <= device_memory

    # A line has both answers of a pair.
    answers = 2 if settings.unit == "pairs" and settings.rows == 1 else 1
    return 64 * _largest(fits, max(1, answers * planner.counts.max_positions // 64))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, if all smaller ones fit too."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def changes(planner: "Planner", settings: PlanSettings) -> list[Change]:
    """Return every single change that saves memory, the cheapest first.

    Only changes that the variant supports are included.
    """
    before = planner.memory(settings).total
    found = (_change(planner, settings, option) for option in _options(settings) if planner.supports(option.requires))
    return [change for change in found if change.memory.total < before]


def cheapest_fix(planner: "Planner", settings: PlanSettings, device_memory: int) -> Change | None:
    """Return the first change that makes the run fit.

    If none does alone, it is the shortest sequence of changes that does; None if there is none.
    """
    for change in changes(planner, settings):
        if change.memory.total <= device_memory:
            return change
    combined: Change | None = None
    for _ in _options(settings):
        current = settings if combined is None else combined.settings
        done = set() if combined is None else set(combined.flags)
        step = next((option for option in changes(planner, current) if not set(option.flags) <= done), None)
        if step is None:
            return None
        combined = step if combined is None else _joined(combined, step)
        if combined.memory.total <= device_memory:
            return combined
    return None


def _joined(one: Change, other: Change) -> Change:
    keys = {flag.partition("=")[0] for flag in other.flags}
    kept = tuple(flag for flag in one.flags if flag.partition("=")[0] not in keys)
    return Change(
        f"{one.name}, {other.name}", f"{one.costs}; {other.costs}", kept + other.flags, other.settings, other.memory
    )


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    costs: str
    flags: tuple[str, ...]
    changes: dict[str, object]
    requires: str = ""


def _change(planner: "Planner", settings: PlanSettings, option: _Option) -> Change:
    changed = settings.with_changes(**option.changes)
    return Change(option.name, option.costs, option.flags, changed, planner.memory(changed))


def _options(settings: PlanSettings) -> Iterator[_Option]:
    if not settings.checkpointing:
        yield _Option(
            "gradient checkpointing",
            "about a third more time",
            ("training.gradient_checkpointing=true",),
            {"checkpointing": True},
            requires="checkpointing",
        )
    # The KL term of labeled answers is a mean over a forward pass, so that one of them is none.
    least = 2 if settings.unit == "labeled answers" else 1
    if settings.batch > least and settings.batch % least == 0 and not settings.in_backward:
        accumulation = settings.accumulation * settings.batch // least
        yield _Option(
            f"a batch of {least} with accumulation",
            "smaller matrix products",
            (f"training.per_device_train_batch_size={least}", f"training.gradient_accumulation_steps={accumulation}"),
            {"batch": least, "accumulation": accumulation},
        )
    if settings.device == "cuda" and "8bit" not in settings.optimizer and settings.optimizer.startswith("adamw"):
        yield _Option(
            "paged 8-bit AdamW",
            "optimizer states in 8 bits",
            ("training.optim=paged_adamw_8bit",),
            {"optimizer": "paged_adamw_8bit"},
        )
    if settings.method == "full" and settings.strategy == "single":
        yield from _little_memory(settings)
    if settings.method == "full":
        yield _Option("LoRA", "trains an adapter only", ("method=lora",), {"method": "lora"})
    if settings.method != "qlora" and settings.strategy != "zero2":
        yield _Option(
            "QLoRA in 4 bits",
            "a third more time, a base model in 4 bits",
            ("method=qlora",),
            {"method": "qlora", "bits": 4, "double": True},
            requires="4 bits",
        )
    yield from _sharding(settings)


def _little_memory(settings: PlanSettings) -> Iterator[_Option]:
    """Yield what full fine-tuning in one process can do without (`peftchat.recipe.memory_rules`)."""
    if settings.master_weights == "float32" and settings.dtype == "bfloat16":
        yield _Option(
            "weights in bfloat16",
            "updates rounded at random",
            ("training.master_weights=bfloat16",),
            {"master_weights": "bfloat16"},
        )
    if not settings.in_backward and settings.dtype != "float16" and settings.accumulation == 1:
        yield _Option(
            "gradients freed as they are used",
            "no clipping, no accumulation",
            ("training.optimizer_in_backward=true", "training.max_grad_norm=0"),
            {"in_backward": True},
        )


def _sharding(settings: PlanSettings) -> Iterator[_Option]:
    if settings.processes > 1:
        stages: Sequence[tuple[str, str]] = (
            ("zero2", "communication of gradients"),
            ("zero3", "communication of all weights in every pass"),
        )
        for stage, costs in stages:
            if settings.strategy < stage and not (stage == "zero3" and settings.bits == 8):
                yield _Option(
                    f"ZeRO-{stage[-1]}", costs, (f"distributed.strategy={stage}",), {"strategy": stage}, requires=stage
                )
    if settings.sharded and settings.offload == "none":
        yield _Option(
            "optimizer states in RAM",
            "optimizer steps on the CPU",
            ("distributed.offload=optimizer",),
            {"offload": "optimizer"},
        )
    if settings.strategy == "zero3" and settings.offload != "all":
        yield _Option(
            "weights in RAM too",
            "transfer of all weights in every pass",
            ("distributed.offload=all",),
            {"offload": "all"},
        )


class Planner:
    """Predicts the memory of one model and adapter; every trace is cached.

    Attributes:
        counts: the parameters of the model.
        estimated: whether some activations are estimated, because the architecture cannot be traced.

    Args:
        config: the base model's config; no weights are read.
        recipe: its adapter counts, or the default adapter for methods that the recipe does not use.

    Raises:
        UserError: no causal language model can be built from the config.
    """

    def __init__(self, config: "PretrainedConfig", recipe: "Recipe") -> None:
        self.config = config
        self.recipe = recipe
        self.counts: ParameterCounts = parameter_counts(config)
        self.estimated = False
        self._eager = needs_eager_attention(config)
        self._trainable: dict[tuple[bool, int], TrainableCounts] = {}
        self._profiles: dict[tuple[TraceConfig, bool], ActivationProfile] = {}
        self._losses: dict[tuple[str, str | None, bool, int, str], LossProfile] = {}

    def supports(self, setting: str) -> bool:
        """Return whether the recipe's variant supports a setting.

        Settings are named as `4 bits`, `zero3` or `checkpointing`.
        """
        if setting in ("4 bits", "8 bits") and not self._quantizable:
            return False
        adapter = self.recipe.adapter
        return adapter is None or adapter.incompatibility(setting) is None

    @functools.cached_property
    def _quantizable(self) -> bool:
        """Whether the base can be quantized under the recipe's adapter, or under the default one."""
        counted = next((counts for (full, _), counts in self._trainable.items() if not full), None)
        if counted is None:
            counted = self._trainable[False, 0] = trainable_counts(self.config, self._with_method("lora"), 0)
        return counted.quantizable

    def memory(self, settings: PlanSettings) -> MemoryPlan:
        """Predict the peak of one device with these settings."""
        trainable = self.trainable(settings)
        return memory_plan(settings, self.counts, trainable, self._activations(settings), self._loss(settings))

    def trainable(self, settings: PlanSettings) -> TrainableCounts:
        """Count the trainable parameters.

        They are those of the model, of the recipe's adapter or of the default adapter.
        """
        full = settings.method == "full"
        key = (full, 0 if full else settings.new_tokens)
        if key not in self._trainable:
            self._trainable[key] = trainable_counts(self.config, self._with_method("full" if full else "lora"), key[1])
        return self._trainable[key]

    @functools.cache  # noqa: B019 - a planner lives as long as one command
    def _with_method(self, method: "Method") -> "Recipe":
        """Return the recipe with another method."""
        if (self.recipe.method == "full") == (method == "full"):
            return self.recipe
        written = self.recipe.model_dump(exclude={"adapter", "quantization"}, exclude_unset=True)
        return type(self.recipe).model_validate({**written, "method": method})

    def with_own_attention(self, settings: PlanSettings) -> PlanSettings:
        """Return the settings with the one attention that the architecture has, if it has one alone."""
        return settings.with_changes(attention="eager") if self._eager else settings

    def _activations(self, settings: PlanSettings) -> ActivationProfile:
        trace_config = self.with_own_attention(settings).trace_config
        full = settings.method == "full"
        if (trace_config, full) not in self._profiles:
            try:
                recipe = self._with_method("full" if full else "lora")
                self._profiles[trace_config, full] = activation_profile(self.config, recipe, trace_config)
            except Exception:
                # An architecture with data-dependent control flow, such as some MoE routers, cannot run on fake
                # tensors, and each raises an error of its own.
                self.estimated = True
                self._profiles[trace_config, full] = estimated_profile(self.counts, trace_config)
        return self._profiles[trace_config, full]

    def _loss(self, settings: PlanSettings) -> LossProfile:
        trace_config, full = settings.trace_config, settings.method == "full"
        key = (trace_config.weight_dtype, trace_config.autocast, full, trace_config.new_tokens, settings.device)
        if key not in self._losses:
            self._losses[key] = loss_profile(
                self.config, self.counts, trace_config, trains_head=full, device=settings.device
            )
        return self._losses[key]
