"""Other ways to train the same model on the same device: method, sharding and checkpointing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.planning.search import largest_batch
from peftchat.planning.settings import PlanSettings

if TYPE_CHECKING:
    from peftchat.planning.planner import Planner
    from peftchat.training.distributed import Strategy


@dataclass(frozen=True, slots=True)
class Cell:
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


def alternatives(planner: "Planner", settings: PlanSettings, room: int) -> Sequence[Cell]:
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
                cells.append(Cell(other, peak, peak <= room, largest_batch(planner, other, room)))
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
