"""Deltas of adapted modules: computed row by row where possible, else by PEFT's own merge of one module."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.adapter_source import ADAPTER, AdaptedModule, InstalledAdapter
from peftchat.merging.deltas import AddDelta, ApplyDelta, Delta, Read, ReplaceRows, ReplaceWeight


def dora_delta(module: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Return the delta of DoRA (Liu et al., 2024) on a linear layer.

    Every row of `W + scaling * B A` is scaled to its trained length. Conv1D stores its outputs as columns, so PEFT
    merges it.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    layer = module.layer
    if type(layer) is not Linear or type(layer.lora_variant.get(ADAPTER)) is not DoraLinearVariant:
        return None
    if layer.fan_in_fan_out or layer.lora_bias[ADAPTER] or module.residual_init:
        return None
    left, right = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
    magnitudes, scaling = layer.lora_magnitude_vector[ADAPTER].weight, layer.scaling[ADAPTER]

    def apply(base: torch.Tensor, start: int) -> torch.Tensor:
        span = slice(start, start + len(base))
        part = left[span].detach().to(torch.float32)
        direction = base.addmm_(part, right.detach().to(torch.float32), alpha=scaling)
        factor = magnitudes[span].detach().to(torch.float32) / torch.linalg.norm(direction, dim=1)
        return direction.mul_(factor[:, None])

    return {f"{module.path}.weight": AddDelta(apply)}


def low_rank_delta(module: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Return the delta of plain LoRA on a Linear, Conv1D or Embedding layer."""
    from peft.tuners.lora.layer import Embedding, Linear

    layer = module.layer
    if type(layer) not in (Linear, Embedding) or layer.lora_variant.get(ADAPTER) or module.residual_init:
        return None
    if layer.lora_bias[ADAPTER]:
        return None
    if isinstance(layer, Embedding):
        # A is [r, tokens] and B is [size, r]; the embedding has one row per token, so the product is transposed.
        left, right = layer.lora_embedding_A[ADAPTER].T, layer.lora_embedding_B[ADAPTER].T
    elif layer.fan_in_fan_out:
        left, right = layer.lora_A[ADAPTER].weight.T, layer.lora_B[ADAPTER].weight.T
    else:
        left, right = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
    return {f"{module.path}.weight": AddDelta(_product(left, right, layer.scaling[ADAPTER]))}


def _product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> ApplyDelta:
    def apply(base: torch.Tensor, start: int) -> torch.Tensor:
        part = left[start : start + len(base)].detach().to(torch.float32)
        return base.addmm_(part, right.detach().to(torch.float32), alpha=scaling)

    return apply


def saved_module_delta(module: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Return the weights of a module's trained copy (`modules_to_save`, LN tuning)."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module.layer, ModulesToSaveWrapper):
        trained = module.layer.modules_to_save[ADAPTER]
    elif isinstance(module.layer, LNTuningLayer):
        trained = module.layer.ln_tuning_layers[ADAPTER]
    else:
        return None
    return {f"{module.path}.{name}": ReplaceWeight(value.detach()) for name, value in trained.named_parameters()}


def saved_parameter_deltas(adapter: InstalledAdapter) -> dict[str, Delta]:
    """Return the base parameters that the adapter's file holds complete."""
    return {name: ReplaceWeight(value) for name, value in adapter.saved.items()}


def token_layer(module: AdaptedModule) -> Any:
    """Return PEFT's layer of trained tokens in a module; None if the module has none."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    layer = module.layer.token_adapter if isinstance(module.layer, TrainableTokensWrapper) else module.layer
    return layer if isinstance(layer, TrainableTokensLayer) else None


def added_token_delta(module: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Return the trained token rows of an embedding or a head."""
    rows = trained_token_rows(module)
    return None if rows is None else {f"{module.path}.weight": rows}


def trained_token_rows(module: AdaptedModule) -> ReplaceRows | None:
    """Return the trained token rows of a module; None if it has none."""
    layer = token_layer(module)
    if layer is None:
        return None
    return ReplaceRows(tuple(layer.token_indices[ADAPTER]), layer.trainable_tokens_delta[ADAPTER].detach())


def merged_layer_delta(module: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Return the deltas of any module that PEFT can merge."""
    merger = _LayerMerger(module, read)
    return {name: AddDelta(merger.apply_for(name), needs_all_rows=True) for name in module.slots}


class _LayerMerger:
    """Merges a module once and returns its parameters one after the other."""

    def __init__(self, module: AdaptedModule, read: Read) -> None:
        self._module = module
        self._read = read
        self._ready: dict[str, torch.Tensor] = {}

    def apply_for(self, name: str) -> ApplyDelta:
        """Return the computation of one of the module's merged parameters."""

        def apply(base: torch.Tensor, start: int) -> torch.Tensor:
            if name not in self._ready:
                self._ready = self._merge(name, base)
            return self._ready.pop(name)

        return apply

    def _merge(self, parameter: str, base: torch.Tensor) -> dict[str, torch.Tensor]:
        module = self._module
        for name, slot in module.slots.items():
            slot.fill(base if name == parameter else self._read(name))
        subtract_init(module)
        try:
            _merge_in_place(module.layer)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(f"PEFT cannot merge {module.path}: {error}") from error
        merged = {name: slot.value() for name, slot in module.slots.items()}
        for slot in module.slots.values():
            slot.empty()
        return merged


def _merge_in_place(module: Any) -> None:
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, ParamWrapper | MultiheadAttention):
        # Several parameters of one module are wrapped in nested layers, and only this method merges them all.
        module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        module.merge()
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merged_adapters.clear()  # the merged weights are taken out next, so nothing stays merged


def subtract_init(module: AdaptedModule) -> None:
    """Subtract the adapter's initialization from the module's base weights and keep the trained factors.

    The module's weights must be real, in float32. Modules with any other initialization stay as they are.
    """
    if not module.residual_init:
        return
    layer = module.layer
    trained = {name: value.detach().clone() for name, value in layer.named_parameters() if f".{ADAPTER}." in name}
    module.residual_init.initialize_layer(layer, ADAPTER)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name in trained:
                value.copy_(trained[name])


DeltaRule = Callable[[AdaptedModule, Read], Mapping[str, Delta] | None]
"""A module and a reader of base parameters -> a delta per parameter, or None where the rule does not apply."""

RULES: tuple[DeltaRule, ...] = (
    added_token_delta,
    saved_module_delta,
    low_rank_delta,
    dora_delta,
    merged_layer_delta,
)


def collect_deltas(adapter: InstalledAdapter, read: Read) -> dict[str, tuple[Delta, ...]]:
    """Return the deltas of every parameter that an adapter changes, by name.

    Where the adapter's file holds the weights below one of its layers, these come first.

    Args:
        adapter: an installed adapter.
        read: returns the base's parameter of a name, all rows, in float32.
    """
    deltas: dict[str, tuple[Delta, ...]] = {name: (delta,) for name, delta in saved_parameter_deltas(adapter).items()}
    for module in adapter.modules:
        found = next(found for rule in RULES if (found := rule(module, read)) is not None)
        for name, delta in found.items():
            deltas[name] = (*deltas.get(name, ()), delta)
    return deltas
