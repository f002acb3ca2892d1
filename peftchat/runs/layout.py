"""Layout of a run over processes, and what of a checkpoint another layout can go on with."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peftchat.runs.checkpoint import Checkpoint

_SHARDED = ("zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is spread over processes.

    Attributes:
        strategy: the resolved strategy: `single`, `ddp`, `zero2` or `zero3`.
        processes: on all machines.
        offload: what DeepSpeed keeps in the memory of the CPU.
        optimizer: transformers' name of it.
        examples_per_step: packs or conversations of one optimizer step, in all processes together.
    """

    strategy: str
    processes: int
    offload: str
    optimizer: str
    examples_per_step: int

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "Layout | None":
        """Return the layout that wrote a checkpoint; None for one of an older version."""
        found = checkpoint.record().get("layout")
        if not isinstance(found, Mapping):
            return None
        try:
            return cls(**found)
        except TypeError:
            return None

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the optimizer's state."""
        return self.strategy in _SHARDED

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        offload = f", offload: {self.offload}" if self.is_sharded and self.offload != "none" else ""
        return f"{processes}, strategy: {self.strategy}{offload}"


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """What going on in another layout means.

    Attributes:
        changes: what differs in the course of the run, in words; it needs to be allowed.
        notes: what differs and does not matter to the course of the run.
        fresh_optimizer: whether the optimizer's state cannot be read.
    """

    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fresh_optimizer: bool = False


def layout_change(checkpoint: Checkpoint, now: Layout) -> LayoutChange:
    """Compare the layout that wrote a checkpoint with the present one."""
    before = Layout.of_checkpoint(checkpoint)
    if before is None:
        return _change_of_old_version(checkpoint, now)
    changes, notes = [], []
    fresh = False
    if (before.is_sharded or now.is_sharded) and _shards(before) != _shards(now) and not _is_converted(before, now):
        fresh = True
        changes.append(f"layout: {now}, and the checkpoint's optimizer state is that of {before}")
    elif before.optimizer != now.optimizer:
        fresh = True
        changes.append(f"optimizer: {now.optimizer}, and the checkpoint's state is that of {before.optimizer}")
    if before.examples_per_step != now.examples_per_step:
        changes.append(
            f"batch: {now.examples_per_step} examples per optimizer step ({now}), expected {before.examples_per_step} "
            f"({before})"
        )
    if not fresh and (before.strategy, before.processes) != (now.strategy, now.processes):
        notes.append(
            f"the checkpoint is of {before}; the run goes on with {now}. Weights, optimizer and steps carry over "
            "exactly. Dropout draws other random numbers"
        )
    return LayoutChange(tuple(changes), tuple(notes), fresh)


def _is_converted(before: Layout, now: Layout) -> bool:
    """Return whether DeepSpeed's converter makes one layout's shards those of the other.

    It knows AdamW's state alone: https://github.com/deepspeedai/DeepSpeed/blob/v0.18.0/deepspeed/checkpoint/ds_to_universal.py
    """
    same = (before.strategy, before.offload, before.optimizer) == (now.strategy, now.offload, now.optimizer)
    return same and now.is_sharded and now.offload == "none" and now.optimizer.startswith("adamw_torch")


def _shards(layout: Layout) -> tuple[str, int, str]:
    return layout.strategy, layout.processes, layout.offload


def _change_of_old_version(checkpoint: Checkpoint, now: Layout) -> LayoutChange:
    """Compare with a checkpoint that tells only whether DeepSpeed wrote it, and by how many processes."""
    sharded = any(checkpoint.path.glob("global_step*"))
    processes = len(checkpoint.token_counts())
    if not (sharded or now.is_sharded) or (sharded and now.is_sharded and processes == now.processes):
        return LayoutChange()
    before = f"{processes} processes under DeepSpeed" if sharded else f"{processes} processes without DeepSpeed"
    return LayoutChange((f"layout: {now}, and the checkpoint's optimizer state is that of {before}",), (), True)
