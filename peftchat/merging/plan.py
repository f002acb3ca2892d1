"""What will be written: every tensor of every shard, known before the first weight is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from peftchat.errors import UserError
from peftchat.merging.fold.change import Change, Replacement, Rows, Update, Weighted, combine
from peftchat.merging.shards import Entry
from peftchat.merging.weights import BaseWeights
from peftchat.merging.writer import TensorSpec

# Bytes in flight for each weight of a block: stored, float32, folded float32 and the stored result.
_FLIGHT = 16


@dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
        spec: name, type and shape in the new shard.
        parameter: the model's parameter it is, or is part of; None for a tensor that no module loads.
        entry: the base's tensor of that name; None where the merge adds one (a head that is no longer tied).
    """

    spec: TensorSpec
    parameter: str | None
    entry: Entry | None


@dataclass(frozen=True)
class Plan:
    """The new checkpoint.

    Attributes:
        shards: file name -> its tensors, widest type first so that each begins at a multiple of its size.
        updates: parameter name -> how it changes. What is not here is copied.
        tied: whether the output head stays tied to the embedding.
        untied: tied names that get a tensor of their own.
    """

    shards: Mapping[str, tuple[Tensor, ...]]
    updates: Mapping[str, Update]
    untied: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of all tensors to write."""
        return sum(tensor.spec.bytes for tensors in self.shards.values() for tensor in tensors)

    @property
    def folded_bytes(self) -> int:
        """Size of those that change."""
        tensors = (tensor for shard in self.shards.values() for tensor in shard)
        return sum(tensor.spec.bytes for tensor in tensors if tensor.parameter in self.updates)


def make_plan(
    weights: BaseWeights, adapters: Sequence[tuple[float, Mapping[str, Change]]], dtype: torch.dtype | None
) -> Plan:
    """Lay out the merged checkpoint in the base's own shards.

    Args:
        weights: the base.
        adapters: weight and changes of each adapter.
        dtype: type of all floating-point tensors; None keeps each as it is stored.
    """
    parts: dict[str, list[Weighted]] = {}
    for weight, changes in adapters:
        for name, change in changes.items():
            parts.setdefault(name, []).append(Weighted(weight, change))
    untied = tuple(name for name, source in weights.hollow.ties.items() if not _same(parts, name, source))
    for name in weights.hollow.ties:
        if name not in untied:
            parts.pop(name, None)
    updates = {name: combine(changes) for name, changes in parts.items()}
    shards = {file: list(_of_file(weights, file, dtype)) for file in weights.checkpoint.files}
    for name in untied:
        source = weights.checkpoint.entries[weights.layout.key_of[weights.source(name)]]
        stored = dtype or source.dtype
        spec = TensorSpec(name, stored, tuple(weights.hollow.slots[name].shape))
        shards[source.file.name].append(Tensor(spec, name, None))
    ordered = {
        file: tuple(sorted(tensors, key=lambda tensor: -tensor.spec.dtype.itemsize)) for file, tensors in shards.items()
    }
    return Plan({file: tensors for file, tensors in ordered.items() if tensors}, updates, untied)


def _of_file(weights: BaseWeights, file: str, dtype: torch.dtype | None) -> Iterator[Tensor]:
    ties = set(weights.hollow.ties)
    for entry in weights.checkpoint.of_file(file):
        fusion = weights.layout.fusion_of.get(entry.name)
        name = fusion.parameters[0] if fusion else weights.layout.parameter_of.get(entry.name)
        if name is None and entry.name in ties:
            continue  # a copy of a tied weight: it would contradict the merged one
        shape = entry.shape
        if name in weights.hollow.slots and not fusion:
            shape = tuple(weights.hollow.slots[name].shape)
        stored = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
        yield Tensor(TensorSpec(entry.name, stored, shape), name, entry)


def _same(parts: Mapping[str, list[Weighted]], one: str, other: str) -> bool:
    """Whether a tied pair changes in the same way on both sides, so that it can stay a pair."""
    left, right = parts.get(one, []), parts.get(other, [])
    return len(left) == len(right) and all(
        a.weight == b.weight and _equal(a.change, b.change) for a, b in zip(left, right, strict=True)
    )


def _equal(one: Change, other: Change) -> bool:
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.ids == other.ids and torch.equal(one.values, other.values)
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return torch.equal(one.value, other.value)
    return False


def check_working_set(plan: Plan, weights: BaseWeights, working_set: int) -> None:
    """Refuse a working set that a single tensor does not fit in where its fold needs the tensor in one piece.

    Raises:
        InputError: names the tensor and the smallest working set that does.
    """
    for name, update in plan.updates.items():
        need = weights.hollow.slots[name].shape.numel() * _FLIGHT
        if need > working_set and (update.whole or not weights.in_blocks(name)):
            raise UserError(
                f"{name} has to be folded in one piece, which takes {need >> 20:,} MB",
                where="--working-set",
                cure=f"Give at least {(need >> 20) + 1}MB.",
            )


def block_bytes(budget: int, stored: torch.dtype) -> int:
    """How many stored bytes may be folded at once within `budget` bytes of memory."""
    return max(1, budget // _FLIGHT) * stored.itemsize
