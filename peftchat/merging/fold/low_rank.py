"""Plain LoRA (Hu et al., 2021) and rsLoRA: `W + scaling * B A`, row by row."""

from collections.abc import Mapping

import torch

from peftchat.merging.adapter import ADAPTER, Site
from peftchat.merging.fold.change import Change, Fold, Read, Update


def rule(site: Site, read: Read) -> Mapping[str, Change] | None:
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
    return {f"{site.path}.weight": Update(_product(left, right, layer.scaling[ADAPTER]))}


def _product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> Fold:
    def rows(base: torch.Tensor, start: int) -> torch.Tensor:
        part = left[start : start + len(base)].detach().to(torch.float32)
        return base.addmm_(part, right.detach().to(torch.float32), alpha=scaling)

    return rows
