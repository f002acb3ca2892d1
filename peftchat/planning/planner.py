"""Other ways to train the same model on the same device: method, sharding and checkpointing."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.planning.activations import (
    ActivationProfile,
    LossProfile,
    TraceConfig,
    activation_profile,
    estimated_profile,
    loss_profile,
)
from peftchat.planning.memory import MemoryPlan, memory_plan
from peftchat.planning.parameter_counts import ParameterCounts, TrainableCounts, parameter_counts, trainable_counts
from peftchat.planning.settings import PlanSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftchat.recipe import Recipe
    from peftchat.recipe.sections import Method
    from peftchat.training.distributed import Strategy


@dataclass(frozen=True, slots=True)
class GridCell:
    """One way to train.

    Attributes:
        settings: with the recipe's own batch and length.
        peak: bytes of one device.
        fits: whether that is there.
        largest_batch: rows in one forward pass that fit.
    """

    settings: PlanSettings
    peak: int
    fits: bool
    largest_batch: int


_METHODS: tuple[tuple[Literal["full", "lora", "qlora"], Literal[4, 8] | None], ...] = (
    ("full", None),
    ("lora", None),
    ("qlora", 8),
    ("qlora", 4),
)


def alternatives(planner: "Planner", settings: PlanSettings, room: int) -> Sequence[GridCell]:
    """Every combination that trains, in the order of what it costs."""
    cells = []
    for method, bits in _METHODS:
        for strategy in _strategies(settings, method, bits):
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
                cells.append(GridCell(other, peak, peak <= room, largest_batch(planner, other, room)))
    return cells


def _strategies(settings: PlanSettings, method: str, bits: int | None) -> "Iterator[Strategy]":
    if settings.processes == 1:
        yield "single"
        return
    yield "ddp"
    yield "zero2"
    # ZeRO-3 cannot slice 8-bit weights.
    if bits != 8:
        yield "zero3"


_MOST_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Change:
    """Settings changed to save memory.

    Attributes:
        name: what is changed, in a few words.
        costs: what one pays for it.
        flags: what to write after `peftchat train RECIPE`.
        settings: with the change.
        memory: the peak with it.
    """

    name: str
    costs: str
    flags: tuple[str, ...]
    settings: PlanSettings
    memory: MemoryPlan


def largest_batch(planner: "Planner", settings: PlanSettings, room: int) -> int:
    """The most rows in one forward pass that fit into `room` bytes; 0 if one does not."""
    return _largest(lambda rows: planner.memory(settings.with_changes(batch=rows)).total <= room, _MOST_ROWS)


def largest_length(planner: "Planner", settings: PlanSettings, room: int) -> int:
    """The longest row, in steps of 64 tokens, that the model takes and that fits into `room` bytes; 0 if none does."""

    def fits(blocks: int) -> bool:
        return planner.memory(settings.with_changes(length=64 * blocks)).total <= room

    return 64 * _largest(fits, max(1, planner.facts.positions // 64))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `fits` holds, which it does up to some number and not beyond."""
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
    """Every single change that saves memory, the cheapest first, with its predicted peak."""
    before = planner.memory(settings).total
    found = (_change(planner, settings, option) for option in _options(settings))
    return [change for change in found if change.memory.total < before]


def cheapest_change(planner: "Planner", settings: PlanSettings, room: int) -> Change | None:
    """The first single change that fits into `room` bytes, else the shortest row of changes that does; None if none."""
    alone = changes(planner, settings)
    for change in alone:
        if change.memory.total <= room:
            return change
    together: Change | None = None
    for _ in _options(settings):
        current = settings if together is None else together.settings
        done = set() if together is None else set(together.flags)
        step = next((option for option in changes(planner, current) if not set(option.flags) <= done), None)
        if step is None:
            return None
        together = step if together is None else _joined(together, step)
        if together.memory.total <= room:
            return together
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
        )
    if settings.batch > 1:
        accumulation = settings.accumulation * settings.batch
        yield _Option(
            "one row at a time, accumulated",
            "smaller matrix products",
            ("training.per_device_train_batch_size=1", f"training.gradient_accumulation_steps={accumulation}"),
            {"batch": 1, "accumulation": accumulation},
        )
    if settings.device == "cuda" and "8bit" not in settings.optimizer and settings.optimizer.startswith("adamw"):
        yield _Option(
            "paged 8-bit AdamW",
            "rounded optimizer states",
            ("training.optim=paged_adamw_8bit",),
            {"optimizer": "paged_adamw_8bit"},
        )
    if settings.method == "full":
        yield _Option("LoRA", "trains an adapter only", ("method=lora",), {"method": "lora"})
    if settings.method != "qlora" and settings.strategy != "zero2":
        yield _Option(
            "QLoRA in 4 bits",
            "a third more time, a rounded base",
            ("method=qlora",),
            {"method": "qlora", "bits": 4, "double": True},
        )
    yield from _sharding(settings)


def _sharding(settings: PlanSettings) -> Iterator[_Option]:
    if settings.processes > 1:
        stages: Sequence[tuple[str, str]] = (
            ("zero2", "communication of gradients"),
            ("zero3", "communication of all weights in every pass"),
        )
        for stage, costs in stages:
            if settings.strategy < stage and not (stage == "zero3" and settings.bits == 8):
                yield _Option(f"ZeRO-{stage[-1]}", costs, (f"distributed.strategy={stage}",), {"strategy": stage})
    if settings.sharded and settings.offload == "none":
        yield _Option(
            "optimizer in main memory",
            "steps on the processor",
            ("distributed.offload=optimizer",),
            {"offload": "optimizer"},
        )
    if settings.strategy == "zero3" and settings.offload != "all":
        yield _Option(
            "weights in main memory too",
            "weights travel in every pass",
            ("distributed.offload=all",),
            {"offload": "all"},
        )


class Planner:
    """Predicts memory for one model and adapter; every trace is made once.

    Attributes:
        facts: counts of the model.
        estimated: whether some activations are a rule of thumb, because the architecture cannot run on shapes.

    Args:
        config: the base model's config; no weight is read.
        recipe: names the adapter, or none, and then its defaults stand in for other methods.
    """

    def __init__(self, config: "PretrainedConfig", recipe: "Recipe") -> None:
        self.config = config
        self.recipe = recipe
        self.facts: ParameterCounts = parameter_counts(config)
        self.estimated = False
        self._trained: dict[tuple[bool, int], TrainableCounts] = {}
        self._profiles: dict[tuple[TraceConfig, bool], ActivationProfile] = {}
        self._losses: dict[tuple[str, str | None, bool, int, str], LossProfile] = {}

    def memory(self, settings: PlanSettings) -> MemoryPlan:
        """The predicted peak of one device under these settings."""
        trained = self.trained(settings)
        return memory_plan(settings, self.facts, trained, self._activations(settings), self._loss(settings))

    def trained(self, settings: PlanSettings) -> TrainableCounts:
        """What is trained: the model, or the recipe's adapter (the default one where it has none)."""
        full = settings.method == "full"
        key = (full, 0 if full else settings.new_tokens)
        if key not in self._trained:
            self._trained[key] = trainable_counts(self.config, self._as("full" if full else "lora"), key[1])
        return self._trained[key]

    @functools.cache  # noqa: B019 - a planner lives as long as one command
    def _as(self, method: "Method") -> "Recipe":
        """The recipe as it would be by another method."""
        if (self.recipe.method == "full") == (method == "full"):
            return self.recipe
        written = self.recipe.model_dump(exclude={"adapter", "quantization"}, exclude_unset=True)
        return type(self.recipe).model_validate({**written, "method": method})

    def _activations(self, settings: PlanSettings) -> ActivationProfile:
        key = settings.activation_key
        full = settings.method == "full"
        if (key, full) not in self._profiles:
            try:
                recipe = self._as("full" if full else "lora")
                self._profiles[key, full] = activation_profile(self.config, recipe, key)
            except Exception:
                # Shapes alone do not tell where a router sends its tokens, for one, and every architecture that
                # cannot run on them says so in its own way.
                self.estimated = True
                self._profiles[key, full] = estimated_profile(self.facts, key)
        return self._profiles[key, full]

    def _loss(self, settings: PlanSettings) -> LossProfile:
        key, full = settings.activation_key, settings.method == "full"
        place = (key.held, key.autocast, full, key.new_tokens, settings.device)
        if place not in self._losses:
            self._losses[place] = loss_profile(self.config, self.facts, key, trains_head=full, device=settings.device)
        return self._losses[place]
