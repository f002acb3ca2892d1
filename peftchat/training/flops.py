"""How much arithmetic training takes, and how much the machine can do."""

import time
from typing import Any

import torch
from torch import nn


def parameters_of(model: nn.Module) -> int:
    """Weights of a model, packed 4-bit ones and ZeRO-3's slices counted at their true size."""
    return sum(true_size(parameter) for parameter in model.parameters())


def true_size(parameter: nn.Parameter) -> int:
    """Elements of one parameter before packing and slicing."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    # ZeRO-3 leaves a slice in place and notes the whole size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def training_flops(
    *, body: int, head: int, trained_body: int, trains_head: bool, tokens: int, supervised: int
) -> float:
    """Floating-point operations of forward and backward over some tokens.

    Two a weight and token forward, two for the gradient of the activations, two for the gradient of weights that are
    trained; the head only where there is a target (Kaplan et al., 2020, without the attention scores).

    Args:
        body: weights behind matrix products, without embedding and head.
        head: weights of the head.
        trained_body: those of the body, adapters included, that are trained.
        trains_head: whether the head is trained.
        tokens: tokens of all batches.
        supervised: those with a target.
    """
    body_flops = (4 * body + 2 * trained_body) * tokens
    head_flops = (6 if trains_head else 4) * head * supervised
    return float(body_flops + head_flops)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """The rate at which this process's device multiplies matrices, measured: floating-point operations a second.

    It is the best of two sizes: there are products that a CPU's library leaves to one core.
    """
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)
    return max(_rate(size, device, dtype, seconds / len(sizes)) for size in sizes)


def _rate(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    best = 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        product = one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
        del product
    return best
