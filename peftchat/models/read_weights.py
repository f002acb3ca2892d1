"""Linear layers of which a model reads the weight instead of calling the layer, as the kernels of Mamba do.

An adapter wraps the call of a layer, so it would have no effect on them and never learn. Their weights cannot be
quantized either.
"""

import contextlib
import inspect
import re
from typing import TYPE_CHECKING

from torch import nn

from peftchat.models.base_config import build_on_meta, carries_state

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layers_not_quantized(config: "PretrainedConfig") -> list[str] | None:
    """Return the names of the layers that quantization has to leave out; None for those of transformers itself."""
    from transformers.quantizers.base import get_keys_to_not_convert

    # To build the others would find none.
    if not carries_state(config):
        return None
    model = build_on_meta(config)
    read = layers_not_called(model)
    return sorted({*get_keys_to_not_convert(model), *read}) if read else None


def layers_not_called(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of linear layers whose weight the module around them reads, by its source.

    So do state-space layers, whose kernels take weights. PEFT refuses some of these layers, for some of the models:
    `_check_lora_target_modules_mamba` in https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py
    """
    names: list[str] = []
    read: dict[str, frozenset[str]] = {}
    for path, module in model.named_modules():
        linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        kind = type(module)
        key = f"{kind.__module__}.{kind.__qualname__}"
        if linear and key not in read:
            read[key] = _weights_read(kind)
        names += [f"{path}.{name}" for name in linear if name in read[key]]
    return tuple(names)


_WEIGHT_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data|is_\w+|ndim|size))(?!\s*=[^=])")


def _weights_read(kind: type) -> frozenset[str]:
    """Return the attributes of a module whose weight its source reads; one that sets a weight is no reader."""
    found: set[str] = set()
    for one in kind.__mro__:
        if "forward" in vars(one) and not one.__module__.startswith("torch."):
            # A class that was made at run time has no source.
            with contextlib.suppress(OSError, TypeError):
                found.update(_WEIGHT_READ.findall(inspect.getsource(one)))
    return frozenset(found)
