"""Compute dtype: float32 on a CPU whose products of bfloat16 matrices are slower than those of float32."""

import functools
import time
from typing import TYPE_CHECKING

from peftchat.formatting import format_bytes
from peftchat.planning.hardware import Hardware
from peftchat.planning.parameter_counts import parameter_counts
from peftchat.runs.run_summary import AutoSetting

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftchat.recipe import Recipe

KEY = "model.compute_dtype"

_SIZES = (64, 512, 512)
"""Rows, width and outputs of the product that is timed: a twentieth of a second where it is slow."""

_WEIGHTS_SHARE = 0.4
"""Fraction of a device's memory that weights in float32 may fill; the rest is for training."""


def choose_compute_dtype(
    recipe: "Recipe", config: "PretrainedConfig", hardware: Hardware, *, sharded: bool
) -> AutoSetting | None:
    """Choose float32 where the recipe leaves the compute dtype open and this CPU is faster with it.

    Args:
        recipe: the recipe.
        config: of its model.
        hardware: this machine, or what is planned for.
        sharded: whether DeepSpeed shards the run; it computes in the dtype of the weights.

    Returns:
        The setting, or None where the run computes in the recipe's dtype.
    """
    model = recipe.model
    if model.compute_dtype != "auto" or model.dtype != "bfloat16" or hardware.device != "cpu" or sharded:
        return None
    from peftchat.models.loading import has_bfloat16_kernels

    # All processes of a machine get one answer.
    if has_bfloat16_kernels():
        return None
    wide, narrow = product_flops("float32"), product_flops("bfloat16")
    if hardware.count == 1 and wide <= narrow:
        return None
    figures = f"products of matrices run at {_giga(wide)} here in float32, at {_giga(narrow)} in bfloat16"
    weights = 4 * parameter_counts(config).parameters
    if weights > _WEIGHTS_SHARE * hardware.memory:
        too_large = f"weights in float32 would take {format_bytes(weights)} of {format_bytes(hardware.memory)}"
        return AutoSetting(KEY, "bfloat16", f"slow: {figures}; {too_large}")
    return AutoSetting(KEY, "float32", figures)


@functools.cache
def product_flops(dtype: str) -> float:
    """Measure the operations per second of a backward pass's product on this CPU, once per process."""
    import torch

    rows, width, outputs = _SIZES
    grad_output, weight = (torch.randn(size).to(getattr(torch, dtype)) for size in ((rows, outputs), (outputs, width)))
    best = float("inf")
    # The first product loads the library.
    for _ in range(4):
        start = time.perf_counter()
        grad_output @ weight
        best = min(best, time.perf_counter() - start)
    return 2 * rows * width * outputs / best


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.2g} GFLOP/s"
