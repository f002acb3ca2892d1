"""Compute the tensors of a plan, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from peftchat.errors import VerificationError
from peftchat.merging.layout import Fusion
from peftchat.merging.plan import Plan, Tensor, block_bytes
from peftchat.merging.shards import read_rows
from peftchat.merging.weights import BaseWeights, blocks


@dataclass
class Producer:
    """Gives the rows of each tensor, folded and in the type to be stored.

    Attributes:
        budget: bytes of memory for one block.
    """

    plan: Plan
    weights: BaseWeights
    budget: int
    _split: dict[str, torch.Tensor] = field(default_factory=dict)
    _split_of: Fusion | None = None

    def rows(self, tensor: Tensor) -> Iterator[torch.Tensor]:
        """The tensor's rows, in order.

        Raises:
            CheckFailed: a value is not a finite number.
        """
        for block in self._blocks(tensor):
            if block.is_floating_point() and block.numel() and not _finite(block):
                raise VerificationError(f"{tensor.spec.name} holds values that are not finite numbers")
            yield block

    def _blocks(self, tensor: Tensor) -> Iterator[torch.Tensor]:
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

    def _ranges(self, tensor: Tensor) -> Iterator[tuple[int, int]]:
        rows = tensor.spec.shape[0] if tensor.spec.shape else 1
        stored = self.weights.dtype(tensor.parameter) if tensor.parameter else tensor.spec.dtype
        return blocks(rows, tensor.spec.bytes // max(1, rows), block_bytes(self.budget, stored))

    def _parameter(self, name: str, tensor: Tensor) -> Iterator[torch.Tensor]:
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
    low, high = torch.aminmax(block)  # one vectorised pass; a NaN anywhere comes out of both
    return bool(torch.isfinite(low) and torch.isfinite(high))
