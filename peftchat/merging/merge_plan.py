"""What will be written: every tensor of every shard, known before the first weight is read."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftchat.errors import UserError, VerificationError
from peftchat.merging.base_weights import BaseWeights, Fusion, blocks
from peftchat.merging.deltas import AddDelta, Delta, ReplaceRows, ReplaceWeight, WeightedDelta, sum_deltas
from peftchat.merging.safetensors_io import TensorEntry, TensorSpec, read_rows

# Bytes in flight for each weight of a block: stored, float32, folded float32 and the stored result.
_FLIGHT = 16


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write.

    Attributes:
        spec: name, type and shape in the new shard.
        parameter: the model's parameter it is, or is part of; None for a tensor that no module loads.
        entry: the base's tensor of that name; None where the merge adds one (a head that is no longer tied).
    """

    spec: TensorSpec
    parameter: str | None
    entry: TensorEntry | None


@dataclass(frozen=True)
class MergePlan:
    """The new checkpoint.

    Attributes:
        shards: file name -> its tensors, widest type first so that each begins at a multiple of its size.
        updates: parameter name -> how it changes. What is not here is copied.
        tied: whether the output head stays tied to the embedding.
        untied: tied names that get a tensor of their own.
    """

    shards: Mapping[str, tuple[PlannedTensor, ...]]
    updates: Mapping[str, AddDelta]
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


def plan_merge(
    weights: BaseWeights, adapters: Sequence[tuple[float, Mapping[str, Delta]]], dtype: torch.dtype | None
) -> MergePlan:
    """Lay out the merged checkpoint in the base's own shards.

    Args:
        weights: the base.
        adapters: weight and changes of each adapter.
        dtype: type of all floating-point tensors; None keeps each as it is stored.
    """
    parts: dict[str, list[WeightedDelta]] = {}
    for weight, changes in adapters:
        for name, change in changes.items():
            parts.setdefault(name, []).append(WeightedDelta(weight, change))
    untied = tuple(name for name, source in weights.hollow.ties.items() if not _same(parts, name, source))
    for name in weights.hollow.ties:
        if name not in untied:
            parts.pop(name, None)
    updates = {name: sum_deltas(changes) for name, changes in parts.items()}
    shards = {file: list(_of_file(weights, file, dtype)) for file in weights.checkpoint.files}
    for name in untied:
        source = weights.checkpoint.entries[weights.layout.key_of[weights.source(name)]]
        stored = dtype or source.dtype
        spec = TensorSpec(name, stored, tuple(weights.hollow.slots[name].shape))
        shards[source.file.name].append(PlannedTensor(spec, name, None))
    ordered = {
        file: tuple(sorted(tensors, key=lambda tensor: -tensor.spec.dtype.itemsize)) for file, tensors in shards.items()
    }
    return MergePlan({file: tensors for file, tensors in ordered.items() if tensors}, updates, untied)


def _of_file(weights: BaseWeights, file: str, dtype: torch.dtype | None) -> Iterator[PlannedTensor]:
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
        yield PlannedTensor(TensorSpec(entry.name, stored, shape), name, entry)


def _same(parts: Mapping[str, list[WeightedDelta]], one: str, other: str) -> bool:
    """Whether a tied pair changes in the same way on both sides, so that it can stay a pair."""
    left, right = parts.get(one, []), parts.get(other, [])
    return len(left) == len(right) and all(
        a.weight == b.weight and _equal(a.change, b.change) for a, b in zip(left, right, strict=True)
    )


def _equal(one: Delta, other: Delta) -> bool:
    if isinstance(one, ReplaceRows) and isinstance(other, ReplaceRows):
        return one.ids == other.ids and torch.equal(one.values, other.values)
    if isinstance(one, ReplaceWeight) and isinstance(other, ReplaceWeight):
        return torch.equal(one.value, other.value)
    return False


def check_memory_budget(plan: MergePlan, weights: BaseWeights, working_set: int) -> None:
    """Refuse a working set that a single tensor does not fit in where its fold needs the tensor in one piece.

    Raises:
        UserError: names the tensor and the smallest working set that does.
    """
    for name, update in plan.updates.items():
        need = weights.hollow.slots[name].shape.numel() * _FLIGHT
        if need > working_set and (update.whole or not weights.in_blocks(name)):
            raise UserError(
                f"{name} has to be folded in one piece, which takes {need >> 20:,} MB",
                where="--memory-budget",
                hint=f"Give at least {(need >> 20) + 1}MB.",
            )


def block_bytes(budget: int, stored: torch.dtype) -> int:
    """How many stored bytes may be folded at once within `budget` bytes of memory."""
    return max(1, budget // _FLIGHT) * stored.itemsize


@dataclass
class ShardBuilder:
    """Gives the rows of each tensor, folded and in the type to be stored.

    Attributes:
        budget: bytes of memory for one block.
    """

    plan: MergePlan
    weights: BaseWeights
    budget: int
    _split: dict[str, torch.Tensor] = field(default_factory=dict)
    _split_of: Fusion | None = None

    def rows(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        """The tensor's rows, in order.

        Raises:
            VerificationError: a value is not a finite number.
        """
        for block in self._blocks(tensor):
            if block.is_floating_point() and block.numel() and not _finite(block):
                raise VerificationError(f"{tensor.spec.name} holds values that are not finite numbers")
            yield block

    def _blocks(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        name, spec = tensor.parameter, tensor.spec
        fusion = self.weights.layout.fusion_of.get(spec.name)
        if fusion is not None and self._changes(fusion):
            yield self._from_fusion(fusion, spec.name).to(spec.dtype)
        elif name is not None and name in self.weights.hollow.slots and fusion is None:
            yield from self._parameter(name, tensor)
        elif tensor.entry is not None:
            for start, stop in self._ranges(tensor):
                yield read_rows(tensor.entry, start, stop).to(spec.dtype)

    def _changes(self, fusion: Fusion) -> bool:
        return any(name in self.plan.updates for name in fusion.parameters)

    def _ranges(self, tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
        rows = tensor.spec.shape[0] if tensor.spec.shape else 1
        stored = self.weights.dtype(tensor.parameter) if tensor.parameter else tensor.spec.dtype
        return blocks(rows, tensor.spec.bytes // max(1, rows), block_bytes(self.budget, stored))

    def _parameter(self, name: str, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        update = self.plan.updates.get(name)
        if update is not None and update.whole:
            whole = self.weights.rows(name).to(torch.float32)
            yield update.rows(whole, 0).to(tensor.spec.dtype)
            return
        for start, stop in self._ranges(tensor):
            base = self.weights.rows(name, start, stop)
            if update is not None:
                base = update.rows(base.to(torch.float32, copy=True), start)
            yield base.to(tensor.spec.dtype)
        self.weights.forget()

    def _from_fusion(self, fusion: Fusion, key: str) -> torch.Tensor:
        if self._split_of is not fusion:
            self._split, self._split_of = {}, fusion
            parameters = {name: self.weights.rows(name).to(torch.float32) for name in fusion.parameters}
            for name in fusion.parameters:
                if name in self.plan.updates:
                    parameters[name] = self.plan.updates[name].rows(parameters[name], 0)
            self.weights.forget()
            self._split = fusion.split(parameters)
        return self._split[key]


def _finite(block: torch.Tensor) -> bool:
    low, high = torch.aminmax(block)  # one vectorized pass; a NaN anywhere comes out of both
    return bool(torch.isfinite(low) and torch.isfinite(high))


JOURNAL_NAME = "merge_state.json"
_DIGEST_CHUNK = 16 << 20


@dataclass
class ResumeState:
    """Finished shards of one merge.

    Attributes:
        path: the file.
        plan: fingerprint of everything that decides the result; a journal of another plan is not continued.
        done: shard -> SHA-256 of the file.
    """

    path: Path
    plan: str
    done: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, plan: str) -> "ResumeState":
        """The journal in `folder`, less the shards that have changed since; a new one if it is of another plan."""
        path = folder / JOURNAL_NAME
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(path, plan)
        if kept.get("plan") != plan:
            return cls(path, plan)
        done = {name: digest for name, digest in kept["shards"].items() if file_digest(folder / name) == digest}
        return cls(path, plan, done)

    def record(self, shard: str, digest: str) -> None:
        """Add a finished shard and write the journal in one step."""
        self.done[shard] = digest
        self.save()

    def save(self) -> None:
        """Write the journal in one step: the old one is there until the new one is whole."""
        text = json.dumps({"plan": self.plan, "shards": self.done}, indent=1)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, "" if there is none."""
    if not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_DIGEST_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def job_fingerprint(parts: Mapping[str, object]) -> str:
    """One hash of everything that decides what a merge writes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
