"""The plan of a merged checkpoint, the shards built from it, and the state that an interrupted merge resumes from."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from peftchat.errors import UserError, VerificationError
from peftchat.merging.base_weights import BaseWeights, Fusion, blocks
from peftchat.merging.combination import Combination
from peftchat.merging.deltas import AddDelta, Delta, ReplaceRows, ReplaceWeight, WeightedDelta, sum_deltas
from peftchat.merging.safetensors_io import TensorSpec
from peftchat.models.rounding import noise_of_rows, round_with_noise
from peftchat.models.safetensors_files import TensorEntry, read_rows

# Memory per weight of a block: stored, float32, merged float32, noise and the stored result.
_BYTES_PER_WEIGHT = 24

Rounding = Literal["stochastic", "nearest"]
"""How weights that change are rounded to bfloat16."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write.

    Attributes:
        spec: name, dtype and shape in the new shard.
        parameter: the model's parameter that it is, or is part of; None for a tensor that no module loads.
        entry: the base's tensor of that name; None where the merge adds one (a head that is no longer tied).
    """

    spec: TensorSpec
    parameter: str | None
    entry: TensorEntry | None


@dataclass(frozen=True)
class MergePlan:
    """The new checkpoint.

    Attributes:
        shards: file name -> its tensors, widest dtype first so that each begins at a multiple of its size.
        deltas: parameter name -> its delta. All other parameters are copied.
        untied: tied names that get a tensor of their own.
    """

    shards: Mapping[str, tuple[PlannedTensor, ...]]
    deltas: Mapping[str, AddDelta]
    untied: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of all tensors to write."""
        return sum(tensor.spec.bytes for tensors in self.shards.values() for tensor in tensors)

    @property
    def changed_bytes(self) -> int:
        """Size of the tensors that change."""
        tensors = (tensor for shard in self.shards.values() for tensor in shard)
        return sum(tensor.spec.bytes for tensor in tensors if tensor.parameter in self.deltas)


def plan_merge(
    weights: BaseWeights,
    adapters: Sequence[tuple[float, Mapping[str, tuple[Delta, ...]]]],
    dtype: torch.dtype | None,
    combination: Combination | None = None,
) -> MergePlan:
    """Plan the merged checkpoint in the shards of the base.

    Args:
        weights: the base.
        adapters: weight and deltas of each adapter.
        dtype: dtype of all floating-point tensors; None keeps each as it is stored.
        combination: how computed deltas become one; None for their weighted sum.
    """
    parts: dict[str, list[WeightedDelta]] = {}
    for number, (weight, adapter_deltas) in enumerate(adapters):
        for name, found in adapter_deltas.items():
            parts.setdefault(name, []).extend(WeightedDelta(weight, delta, number) for delta in found)
    untied = tuple(name for name, source in weights.empty_model.ties.items() if not _same_deltas(parts, name, source))
    for name in weights.empty_model.ties:
        if name not in untied:
            parts.pop(name, None)
    if combination is not None and combination.rule == "linear":
        combination = None  # A weighted sum needs no more than a few rows at a time.
    deltas = {
        name: sum_deltas(weighted, None if combination is None else partial(combination.combine, name))
        for name, weighted in parts.items()
    }
    shards = {file: list(_tensors_of_file(weights, file, dtype)) for file in weights.checkpoint.files}
    for name in untied:
        if name in weights.checkpoint.entries and name in weights.tensor_map.parameter_of:
            raise UserError(
                f"the adapter changes {name} and {weights.source(name)} in different ways, and the base stores both as "
                f"{name}",
                where=str(weights.checkpoint.folder),
                hint="Save the base once with transformers' save_pretrained, and merge into that.",
            )
        source = weights.checkpoint.entries[weights.tensor_map.key_of[weights.source(name)]]
        stored = dtype or source.dtype
        spec = TensorSpec(name, stored, tuple(weights.empty_model.slots[name].shape))
        shards[source.file.name].append(PlannedTensor(spec, name, None))
    ordered = {
        file: tuple(sorted(tensors, key=lambda tensor: -tensor.spec.dtype.itemsize)) for file, tensors in shards.items()
    }
    return MergePlan({file: tensors for file, tensors in ordered.items() if tensors}, deltas, untied)


def _tensors_of_file(weights: BaseWeights, file: str, dtype: torch.dtype | None) -> Iterator[PlannedTensor]:
    ties = set(weights.empty_model.ties)
    for entry in weights.checkpoint.of_file(file):
        fusion = weights.tensor_map.fusion_of.get(entry.name)
        name = fusion.parameters[0] if fusion else weights.tensor_map.parameter_of.get(entry.name)
        if name is None and entry.name in ties:
            continue  # a copy of a tied weight: it would differ from the merged one
        shape = entry.shape
        if name in weights.empty_model.slots and not fusion:
            shape = tuple(weights.empty_model.slots[name].shape)
        stored = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
        yield PlannedTensor(TensorSpec(entry.name, stored, shape), name, entry)


def _same_deltas(parts: Mapping[str, list[WeightedDelta]], one: str, other: str) -> bool:
    """Return whether both sides of a tied pair change in the same way, so that they can stay tied."""
    left, right = parts.get(one, []), parts.get(other, [])
    return len(left) == len(right) and all(
        a.weight == b.weight and _equal(a.delta, b.delta) for a, b in zip(left, right, strict=True)
    )


def _equal(one: Delta, other: Delta) -> bool:
    if isinstance(one, ReplaceRows) and isinstance(other, ReplaceRows):
        return one.ids == other.ids and torch.equal(one.values, other.values)
    if isinstance(one, ReplaceWeight) and isinstance(other, ReplaceWeight):
        return torch.equal(one.value, other.value)
    return False


def check_memory_budget(plan: MergePlan, weights: BaseWeights, memory_budget: int) -> None:
    """Reject a memory budget that is too small for a tensor that must be merged in one piece.

    Raises:
        UserError: names the tensor and the smallest budget for it.
    """
    for name, delta in plan.deltas.items():
        need = weights.empty_model.slots[name].shape.numel() * _BYTES_PER_WEIGHT
        if need > memory_budget and (delta.needs_all_rows or not weights.can_read_rows(name)):
            raise UserError(
                f"{name} must be merged in one piece, which needs {need >> 20:,} MB, got {memory_budget >> 20:,} MB",
                where="--memory-budget",
                hint=f"Set it to at least {(need >> 20) + 1}MB.",
            )


def block_bytes(budget: int, stored: torch.dtype) -> int:
    """Return how many stored bytes can be merged at once within `budget` bytes of memory."""
    return max(1, budget // _BYTES_PER_WEIGHT) * stored.itemsize


@dataclass
class ShardBuilder:
    """Computes the rows of each tensor, merged and in the dtype to be stored.

    Attributes:
        budget: bytes of memory for one block.
        rounding: of weights that change, where they are stored in bfloat16.
    """

    plan: MergePlan
    weights: BaseWeights
    budget: int
    rounding: Rounding = "stochastic"
    _split: dict[str, torch.Tensor] = field(default_factory=dict)
    _split_of: Fusion | None = None

    def rows(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        """Yield the tensor's rows, in order.

        Raises:
            VerificationError: a value is not a finite number.
        """
        for block in self._blocks(tensor):
            if block.is_floating_point() and block.numel() and not _finite(block):
                raise VerificationError(f"{tensor.spec.name} has values that are not finite numbers")
            yield block

    def _blocks(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        name, spec = tensor.parameter, tensor.spec
        fusion = self.weights.tensor_map.fusion_of.get(spec.name)
        if fusion is not None and any(name in self.plan.deltas for name in fusion.parameters):
            changes = any(self._is_update(name) for name in fusion.parameters)
            yield self._rounded(self._split_fusion(fusion, spec.name), 0, spec, changes=changes)
        elif name is not None and name in self.weights.empty_model.slots and fusion is None:
            yield from self._merged_rows(name, tensor)
        elif tensor.entry is not None:
            for start, stop in self._ranges(tensor):
                yield read_rows(tensor.entry, start, stop).to(spec.dtype)

    def _ranges(self, tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
        rows = tensor.spec.shape[0] if tensor.spec.shape else 1
        stored = self.weights.dtype(tensor.parameter) if tensor.parameter else tensor.spec.dtype
        return blocks(rows, tensor.spec.bytes // max(1, rows), block_bytes(self.budget, stored))

    def _merged_rows(self, name: str, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        delta = self.plan.deltas.get(name)
        if delta is not None and delta.needs_all_rows:
            base = self.weights.rows(name).to(torch.float32)
            yield self._rounded(delta.apply(base, 0), 0, tensor.spec, changes=self._is_update(name))
            return
        for start, stop in self._ranges(tensor):
            base = self.weights.rows(name, start, stop)
            if delta is not None:
                base = delta.apply(base.to(torch.float32, copy=True), start)
            yield self._rounded(base, start, tensor.spec, changes=self._is_update(name))
        self.weights.release()

    def _is_update(self, name: str) -> bool:
        """Return whether the merge adds to a parameter; replaced values are rounded to the nearest."""
        delta = self.plan.deltas.get(name)
        return delta is not None and not delta.only_replaces

    def _rounded(self, rows: torch.Tensor, start: int, spec: TensorSpec, *, changes: bool) -> torch.Tensor:
        """Return rows in the dtype to be stored; the result does not depend on how a tensor is divided into blocks."""
        if not changes or self.rounding == "nearest" or spec.dtype != torch.bfloat16:
            return rows.to(spec.dtype)
        return round_with_noise(rows, noise_of_rows(spec.name, start, rows.shape))

    def _split_fusion(self, fusion: Fusion, key: str) -> torch.Tensor:
        if self._split_of is not fusion:
            self._split, self._split_of = {}, fusion
            parameters = {name: self.weights.rows(name).to(torch.float32) for name in fusion.parameters}
            for name in fusion.parameters:
                if name in self.plan.deltas:
                    parameters[name] = self.plan.deltas[name].apply(parameters[name], 0)
            self.weights.release()
            self._split = fusion.split(parameters)
        return self._split[key]


def _finite(block: torch.Tensor) -> bool:
    low, high = torch.aminmax(block)  # one vectorized pass; both are NaN if any value is
    return bool(torch.isfinite(low) and torch.isfinite(high))


RESUME_STATE_NAME = "merge_state.json"
_DIGEST_CHUNK = 16 << 20


@dataclass
class ResumeState:
    """Finished shards of one merge.

    Attributes:
        path: the file.
        fingerprint: of everything that determines the result; the state of another merge is not resumed.
        done: shard -> SHA-256 of the file.
    """

    path: Path
    fingerprint: str
    done: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> "ResumeState":
        """Read the state in `folder`, without shards that changed since; new if it is of another merge."""
        path = folder / RESUME_STATE_NAME
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(path, fingerprint)
        if state.get("plan") != fingerprint:
            return cls(path, fingerprint)
        done = {name: digest for name, digest in state["shards"].items() if file_digest(folder / name) == digest}
        return cls(path, fingerprint, done)

    def record(self, shard: str, digest: str) -> None:
        """Add a finished shard and save the state."""
        self.done[shard] = digest
        self.save()

    def save(self) -> None:
        """Write the state atomically: the old file stays until the new one is complete."""
        text = json.dumps({"plan": self.fingerprint, "shards": self.done}, indent=1)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file, "" if there is none."""
    if not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_DIGEST_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def job_fingerprint(parts: Mapping[str, object]) -> str:
    """Return one hash of everything that determines what a merge writes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
