"""What fits: the largest batch and length, and the cheapest change that makes a run fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.planning.memory import MemoryPlan
from peftchat.planning.settings import PlanSettings

if TYPE_CHECKING:
    from peftchat.planning.planner import Planner

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
