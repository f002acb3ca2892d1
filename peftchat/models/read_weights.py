"""Linear layers of which a model reads the weight instead of calling the layer, as the kernels of Mamba do.

An adapter wraps the call of a layer, so it would have no effect on them and never learn. Their weights cannot be
quantized either.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, cast

from torch import nn

from peftchat.models.base_config import build_on_meta, carries_state

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def layers_not_quantized(config: "PretrainedConfig") -> list[str] | None:
    """Return the names of the layers that quantization has to leave out; None for those of transformers itself."""
    from transformers.quantizers.base import get_keys_to_not_convert

    # To build the others would find none.
    if not carries_state(config):
        return None
    model = build_on_meta(config)
    read = layers_not_called(model)
    return sorted({*get_keys_to_not_convert(model), *read}) if read else None


def layers_not_called(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the dotted names of linear layers whose weight the module around them reads, by its source.

    So do state-space layers, whose kernels take weights. PEFT refuses some of these layers, for some of the models:
    `_check_lora_target_modules_mamba` in https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py
    """
    # Kernels take weights in the place of calls. Without a state there are none: BLOOM's other way is off by default.
    has_kernels = carries_state(model.config)

    def is_passed_by(name: str, kind: Hashable) -> bool:
        return name in _weights_read(kind) and (has_kernels or name not in _layers_called(kind))

    return tuple(
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and is_passed_by(name, cast("Hashable", type(module)))
    )


_LAYER_CALLED = re.compile(r"\bself\.(\w+)\(")

_WEIGHT_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data|is_\w+|ndim|size))(?!\s*=[^=])")


@functools.cache
def _weights_read(kind: Hashable) -> frozenset[str]:
    """Return the attributes of a class of modules whose weight its source reads; to set a weight is no reading.

    Finding the source of a class parses its file, and a plan asks for the same classes many times.
    """
    return frozenset(_WEIGHT_READ.findall(_source_of(kind)))


@functools.cache
def _layers_called(kind: Hashable) -> frozenset[str]:
    """Return the attributes of a class of modules that its source calls."""
    return frozenset(_LAYER_CALLED.findall(_source_of(kind)))


def _source_of(kind: Hashable) -> str:
    """Return the source of the classes with a forward that a class of modules is made of."""
    assert isinstance(kind, type)
    found = []
    for one in kind.__mro__:
        if "forward" in vars(one) and not one.__module__.startswith("torch."):
            # A class that was made at run time has no source.
            with contextlib.suppress(OSError, TypeError):
                found.append(inspect.getsource(one))
    return "\n".join(found)
