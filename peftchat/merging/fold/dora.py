"""DoRA (Liu et al., 2024) on linear layers: every row of `W + scaling * B A` gets the length that was trained."""

from collections.abc import Mapping

import torch

from peftchat.merging.adapter import ADAPTER, Site
from peftchat.merging.fold.change import Change, Read, Update


def rule(site: Site, read: Read) -> Mapping[str, Change] | None:
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

    return {f"{site.path}.weight": Update(rows)}
