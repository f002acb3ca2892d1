"""Corrections of libraries, each as narrow as it can be, each with what forced it.

The tests hold a case for each that fails once the library no longer needs it.
"""

from torch import nn


def keep_4bit_weights_as_quantised(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU at the first forward without gradients.

    The packed form rounds the scales to bfloat16, so that an evaluation would change the base under the adapter, and
    it asserts that every layer's width is a multiple of 32. bitsandbytes 0.50, `Linear4bit.forward`.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
