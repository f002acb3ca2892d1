"""An adapter's updates of linear layers, factored into the two thin matrices of a LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.adapter_source import ADAPTER, AdaptedModule, InstalledAdapter
from peftchat.merging.base_weights import BaseWeights
from peftchat.merging.delta_rules import collect_deltas, token_layer
from peftchat.merging.deltas import AddDelta

_EXACT_SIZE = 1024
"""Up to this smaller side a matrix is decomposed exactly; larger ones by a randomized method, which is much faster."""

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class FactoredUpdate:
    """The update of one linear layer, `left @ right`, its largest singular directions first.

    Attributes:
        path: dotted name of the layer in the base.
        left: float32, shape (outputs, k), each column scaled by the square root of its singular value.
        right: float32, shape (k, inputs), each row scaled likewise.
        singular_values: float32, shape (k,), descending.
        squared_norm: squared Frobenius norm of the complete update.
        is_conv1d: the layer is a Conv1D, which stores its weight as inputs x outputs.
    """

    path: str
    left: torch.Tensor
    right: torch.Tensor
    singular_values: torch.Tensor
    squared_norm: float
    is_conv1d: bool

    def at_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return LoRA's B, shape (outputs, rank), and A, shape (rank, inputs); zeros fill what is beyond `k`."""
        kept = min(rank, len(self.singular_values))
        lora_b, lora_a = self.left.new_zeros(len(self.left), rank), self.right.new_zeros(rank, self.right.shape[1])
        lora_b[:, :kept], lora_a[:kept] = self.left[:, :kept], self.right[:kept]
        return lora_b, lora_a


def relative_error(updates: Sequence[FactoredUpdate], rank: int) -> float:
    """Return the norm of what a rank leaves out, as a fraction of the norm of all updates together."""
    total = sum(update.squared_norm for update in updates)
    kept = sum(float(update.singular_values[:rank].double().square().sum()) for update in updates)
    return max(0.0, 1.0 - kept / total) ** 0.5 if total else 0.0


def linear_modules(adapter: InstalledAdapter, where: str, hint: str | None = None) -> list[AdaptedModule]:
    """Return the linear layers that an adapter changes, if a LoRA can hold what it does to them.

    Args:
        adapter: the installed adapter.
        where: the adapter, for messages.
        hint: what to do instead; None for merging it.

    Raises:
        UserError: PEFT does not convert a layer of this kind, or there is none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    changed = [
        module for module in adapter.modules if isinstance(module.layer, BaseTunerLayer) and token_layer(module) is None
    ]
    for module in changed:
        if not module.layer.supports_lora_conversion(ADAPTER) or _linear_weight(module) is None:
            raise UserError(
                f"PEFT does not convert {type(module.layer).__name__} on {module.path} ("
                f"{type(module.layer.get_base_layer()).__name__}) to LoRA",
                where=where,
                hint=hint or _merge_hint(where),
            )
    if not changed:
        what = "the adapter changes no linear layer, so there is nothing to convert"
        raise UserError(what, where=where, hint=hint or _merge_hint(where))
    return changed


def factor_updates(
    adapter: InstalledAdapter, modules: Sequence[AdaptedModule], weights: BaseWeights, max_rank: int, where: str
) -> list[FactoredUpdate]:
    """Compute the update of each layer, merged weight minus base weight, and factor it.

    Args:
        adapter: the installed adapter.
        modules: what `linear_modules` returned.
        weights: the base.
        max_rank: the most singular directions to keep.
        where: the adapter, for messages.

    Raises:
        UserError: an update is not finite, or changes more than the layer's weight.
    """

    updates = []
    for module in modules:
        update = dense_update(adapter, module, weights, where)
        is_conv1d = stores_transposed(module)
        updates.append(factor_matrix(module.path, update.T if is_conv1d else update, max_rank, is_conv1d=is_conv1d))
    return updates


def dense_update(
    adapter: InstalledAdapter, module: AdaptedModule, weights: BaseWeights, where: str, hint: str | None = None
) -> torch.Tensor:
    """Return the update of one layer, merged weight minus base weight: float32, in the shape that is stored.

    Raises:
        UserError: it is not finite, or the adapter changes more than the layer's weight.
    """

    def read(name: str) -> torch.Tensor:
        return weights.rows(name).to(torch.float32, copy=True)

    deltas = collect_deltas(InstalledAdapter(adapter.empty_model, (module,), {}), read)
    changes = {}
    for name, (delta,) in deltas.items():
        assert isinstance(delta, AddDelta)
        before = read(name)
        changes[name] = delta.apply(before.clone(), 0) - before
    weights.release()
    update = changes.pop(f"{module.path}.weight")
    other = next((name for name, change in changes.items() if bool(change.any())), None)
    if other is not None:
        what = f"the adapter changes {other}, and a plain LoRA changes matrices only"
        raise UserError(what, where=where, hint=hint or _merge_hint(where))
    check_finite(module.path, update, where)
    return update


def check_finite(path: str, update: torch.Tensor, where: str) -> None:
    """Check that the update of a layer has numbers only.

    Raises:
        UserError: it does not.
    """
    if not bool(update.isfinite().all()):
        hint = "The training diverged: take an earlier checkpoint."
        raise UserError(f"the update of {path} has values that are not finite", where=where, hint=hint)


def stores_transposed(module: AdaptedModule) -> bool:
    """Return whether the layer stores its weight as inputs x outputs."""
    return not isinstance(_linear_weight(module), torch.nn.Linear)


def _merge_hint(where: str) -> str:
    return f"Merge it instead: `peftchat merge {where}`."


def _linear_weight(module: AdaptedModule) -> Any:
    """Return the module's base layer if it is linear, else None."""
    from transformers.pytorch_utils import Conv1D

    layer = module.layer.get_base_layer()
    return layer if isinstance(layer, torch.nn.Linear | Conv1D) else None


def factor_matrix(path: str, matrix: torch.Tensor, max_rank: int, *, is_conv1d: bool) -> FactoredUpdate:
    """Factor a layer's update, shape (outputs, inputs), by its singular values."""
    size = min(matrix.shape)
    kept = min(size, max_rank)
    if size <= _EXACT_SIZE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, min(size, kept + _OVERSAMPLING), _POWER_ITERATIONS)
        right = right.T
    squared_norm = float(matrix.double().square().sum())
    return _scaled(path, left[:, :kept], values[:kept], right[:kept], squared_norm, is_conv1d=is_conv1d)


def factor_product(
    path: str, left: torch.Tensor, right: torch.Tensor, max_rank: int, *, is_conv1d: bool
) -> FactoredUpdate:
    """Factor an update that is a product of thin matrices, (outputs, k) and (k, inputs), without forming it."""
    outer, left_small = torch.linalg.qr(left)
    inner, right_small = torch.linalg.qr(right.T)
    first, values, last = torch.linalg.svd(left_small @ right_small.T, full_matrices=False)
    kept = min(len(values), max_rank)
    factors = outer @ first[:, :kept], values[:kept], last[:kept] @ inner.T
    return _scaled(path, *factors, float(values.double().square().sum()), is_conv1d=is_conv1d)


def _scaled(
    path: str, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, squared_norm: float, *, is_conv1d: bool
) -> FactoredUpdate:
    root = values.sqrt()
    return FactoredUpdate(
        path,
        (left * root).to(torch.float32).contiguous(),
        (right * root[:, None]).to(torch.float32).contiguous(),
        values.to(torch.float32, copy=True),
        squared_norm,
        is_conv1d,
    )
