"""DoRA (Liu et al., 2024) on linear layers: every row of `W + scaling * B A` gets the length that was trained."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.adapter_source import ADAPTER, AdaptedModule, AdapterWeights
from peftchat.merging.deltas import AddDelta, ApplyDelta, Delta, Read, ReplaceRows, ReplaceWeight


def dora_delta(site: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Linear layers whose rows are outputs. Conv1D norms run over columns, so those go by the whole layer."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    layer = site.module
    if type(layer) is not Linear or type(layer.lora_variant.get(ADAPTER)) is not DoraLinearVariant:
        return None
    if layer.fan_in_fan_out or layer.lora_bias[ADAPTER] or site.start:
        return None
    left, right = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
    lengths, scaling = layer.lora_magnitude_vector[ADAPTER].weight, layer.scaling[ADAPTER]

    def rows(base: torch.Tensor, start: int) -> torch.Tensor:
        span = slice(start, start + len(base))
        part = left[span].detach().to(torch.float32)
        direction = base.addmm_(part, right.detach().to(torch.float32), alpha=scaling)
        factor = lengths[span].detach().to(torch.float32) / torch.linalg.norm(direction, dim=1)
        return direction.mul_(factor[:, None])

    return {f"{site.path}.weight": AddDelta(rows)}


def low_rank_delta(site: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Linear, Conv1D and Embedding layers without a variant, a trained LoRA bias or a start taken out of the base."""
    from peft.tuners.lora.layer import Embedding, Linear

    layer = site.module
    if type(layer) not in (Linear, Embedding) or layer.lora_variant.get(ADAPTER) or site.start:
        return None
    if layer.lora_bias[ADAPTER]:
        return None
    if isinstance(layer, Embedding):
        # A is [r, words] and B is [size, r]: the embedding's rows are words, so the product is used transposed.
        left, right = layer.lora_embedding_A[ADAPTER].T, layer.lora_embedding_B[ADAPTER].T
    elif layer.fan_in_fan_out:
        left, right = layer.lora_A[ADAPTER].weight.T, layer.lora_B[ADAPTER].weight.T
    else:
        left, right = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
    return {f"{site.path}.weight": AddDelta(_product(left, right, layer.scaling[ADAPTER]))}


def _product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> ApplyDelta:
    def rows(base: torch.Tensor, start: int) -> torch.Tensor:
        part = left[start : start + len(base)].detach().to(torch.float32)
        return base.addmm_(part, right.detach().to(torch.float32), alpha=scaling)

    return rows


def saved_module_delta(site: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """A module with a trained copy, which takes its place."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(site.module, ModulesToSaveWrapper):
        trained = site.module.modules_to_save[ADAPTER]
    elif isinstance(site.module, LNTuningLayer):
        trained = site.module.ln_tuning_layers[ADAPTER]
    else:
        return None
    return {f"{site.path}.{name}": ReplaceWeight(value.detach()) for name, value in trained.named_parameters()}


def from_file(adapter: AdapterWeights) -> dict[str, Delta]:
    """Base parameters that lie in the file beside the adapter's own."""
    return {name: ReplaceWeight(value) for name, value in adapter.saved.items()}


def layer_of(site: AdaptedModule) -> Any:
    """PEFT's token layer of a site, None if it is a site of another kind."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    layer = site.module.token_adapter if isinstance(site.module, TrainableTokensWrapper) else site.module
    return layer if isinstance(layer, TrainableTokensLayer) else None


def added_token_delta(site: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Token rows beside another method, or trained alone; on the embedding, on the head, or on both through a tie."""
    rows = token_ids_of(site)
    return None if rows is None else {f"{site.path}.weight": rows}


def token_ids_of(site: AdaptedModule) -> ReplaceRows | None:
    """The trained rows of a site, None if it is a site of another kind."""
    layer = layer_of(site)
    if layer is None:
        return None
    return ReplaceRows(tuple(layer.token_indices[ADAPTER]), layer.trainable_tokens_delta[ADAPTER].detach())


def whole_layer_delta(site: AdaptedModule, read: Read) -> Mapping[str, Delta] | None:
    """Anything that PEFT can merge."""
    folder = _LayerMerger(site, read)
    return {name: AddDelta(folder.result(name), whole=True) for name in site.slots}


class _LayerMerger:
    """Merge a site once and hand out its parameters one after the other."""

    def __init__(self, site: AdaptedModule, read: Read) -> None:
        self._site = site
        self._read = read
        self._ready: dict[str, torch.Tensor] = {}

    def result(self, name: str) -> ApplyDelta:
        """The fold of one of the site's parameters."""

        def rows(base: torch.Tensor, start: int) -> torch.Tensor:
            if name not in self._ready:
                self._ready = self._merge(name, base)
            return self._ready.pop(name)

        return rows

    def _merge(self, asked: str, base: torch.Tensor) -> dict[str, torch.Tensor]:
        site = self._site
        for name, slot in site.slots.items():
            slot.fill(base if name == asked else self._read(name))
        subtract_init(site)
        try:
            _merge_in_place(site.module)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(f"PEFT cannot merge {site.path}: {error}") from error
        merged = {name: slot.value() for name, slot in site.slots.items()}
        for slot in site.slots.values():
            slot.empty()
        return merged


def _merge_in_place(module: Any) -> None:
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, ParamWrapper | MultiheadAttention):
        # Several parameters of one module are wrapped one in the other, and only this method merges them all.
        module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        module.merge()
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merged_adapters.clear()  # the weights are about to leave: nothing is merged here any more


def subtract_init(site: AdaptedModule) -> None:
    """Turn the site's base weights into the remainder the adapter was trained on; keep the trained factors.

    The site's weights must be real, in float32. Sites with any other start stay as they are.
    """
    if not site.start:
        return
    layer = site.module
    trained = {name: value.detach().clone() for name, value in layer.named_parameters() if f".{ADAPTER}." in name}
    if site.start == "pissa":
        layer.pissa_init(ADAPTER, site.start)
    else:
        layer.olora_init(ADAPTER)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name in trained:
                value.copy_(trained[name])


DeltaRule = Callable[[AdaptedModule, Read], Mapping[str, Delta] | None]
"""A site and a reader of base parameters -> the changed parameters, or None where the rule does not apply."""

RULES: tuple[DeltaRule, ...] = (
    added_token_delta,
    saved_module_delta,
    low_rank_delta,
    dora_delta,
    whole_layer_delta,
)


def collect_deltas(adapter: AdapterWeights, read: Read) -> dict[str, Delta]:
    """Everything that `adapter` changes, by parameter name.

    Args:
        adapter: an installed adapter.
        read: the base's parameter of a name, whole, in float32.
    """
    changes: dict[str, Delta] = {}
    for site in adapter.sites:
        changes.update(next(found for rule in RULES if (found := rule(site, read)) is not None))
    changes.update(from_file(adapter))
    return changes
