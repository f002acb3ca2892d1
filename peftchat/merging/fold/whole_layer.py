"""Every other method: PEFT's own `merge`, on one module at a time.

The module gets its base weights in float32, PEFT merges, the result is taken out and the module is emptied again. What
is right for a method is then PEFT's knowledge, and memory holds one layer.
"""

from collections.abc import Mapping
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.adapter import Site
from peftchat.merging.fold.change import Change, Fold, Read, Update
from peftchat.merging.residual import take_out_start


def rule(site: Site, read: Read) -> Mapping[str, Change] | None:
    """Anything that PEFT can merge."""
    folder = _LayerFolder(site, read)
    return {name: Update(folder.result(name), whole=True) for name in site.slots}


class _LayerFolder:
    """Merge a site once and hand out its parameters one after the other."""

    def __init__(self, site: Site, read: Read) -> None:
        self._site = site
        self._read = read
        self._ready: dict[str, torch.Tensor] = {}

    def result(self, name: str) -> Fold:
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
        take_out_start(site)
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
