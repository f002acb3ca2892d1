"""LoRA's branch as one differentiable step, in the dtype of the activations.

PEFT computes `result + B(A(x)) * scaling`: three tensors of the output's size a layer beside the result, and under
autocast `x` is first copied to the float32 of the adapter and then back. Here one matrix product adds the
branch. The layers, their weights and what is saved stay PEFT's own.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def fuse_lora_forward(model: PeftModel) -> int:
    """Let the model's plain LoRA layers compute their branch by `_Branch`; returns how many there are.

    Left alone are layers that do more than `result + B(A(x)) * scaling`: DoRA and other variants of it, biased
    branches, several adapters, embeddings. Outside training (adapters switched off or merged) layers behave as before.
    Not for ZeRO-3, which gathers weights when their own module is called.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def num_adapted_layers(model: PeftModel) -> int:
    """How many layers the adapter has changed."""
    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, lora_layer.LoraLayer) or not _adds_linear(module):
        return False
    adapters = module.active_adapters
    return (
        len(adapters) == 1
        and set(module.lora_A) == set(adapters)
        and not module.lora_variant
        and module.lora_B[adapters[0]].bias is None
    )


def _adds_linear(module: nn.Module) -> bool:
    if type(module) is lora_layer.Linear:
        return True
    # bitsandbytes' layers exist only where it is installed.
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and type(module).__module__ == "peft.tuners.lora.bnb"


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
        result: Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    name = self.active_adapters[0]
    dropped = self.lora_dropout[name](x)
    branch = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    base = self.base_layer
    if dropped is x and type(base) is nn.Linear and not base.weight.requires_grad:
        output: Tensor = _LinearAndBranch.apply(x, base.weight, base.bias, *branch)
    else:
        result = base(x, *args, **kwargs)
        output = _Branch.apply(dropped, result.reshape(-1, result.shape[-1]), *branch)
    # A view made out here may be changed in place, as some models do; one made in the function may not.
    return output.view(*x.shape[:-1], -1)


class _Branch(torch.autograd.Function):
    """`result + (x A^T) B^T * scaling`.

    Shapes: x (..., I), result and output (n, O) for n rows of x, A (r, I), B (O, r). The products are taken in the
    dtype of the result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        dtype = result.dtype
        with torch.autocast(x.device.type, enabled=False):
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
            rows = x.reshape(-1, x.shape[-1])
            narrow = rows @ a.T
            output = torch.addmm(result, narrow, b.T, alpha=scaling)
        ctx.save_for_backward(x, narrow, a, b)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, a, b = ctx.saved_tensors
        slope = outputs[0]
        of_narrow, of_a, of_b = _slopes(slope, x, narrow, b, ctx.scaling)
        of_x = (of_narrow @ a).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, slope, of_a, of_b, None


class _LinearAndBranch(torch.autograd.Function):
    """A frozen linear layer and its branch together, so that the gradient of `x` is one tensor.

    Shapes: x (..., I), weight (O, I), bias (O,) or None, A (r, I), B (O, r), output (n, O) for n rows of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x, weight, a, b = x.to(dtype), weight.to(dtype), a.to(dtype), b.to(dtype)
            rows = x.reshape(-1, x.shape[-1])
            narrow = rows @ a.T
            result = _addmm(F.linear(rows, weight, None if bias is None else bias.to(dtype)), narrow * scaling, b.T)
        ctx.save_for_backward(x, narrow, weight, a, b)
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, weight, a, b = ctx.saved_tensors
        flat = outputs[0]
        of_narrow, of_a, of_b = _slopes(flat, x, narrow, b, ctx.scaling)
        of_x = _addmm(flat @ weight, of_narrow, a).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_a, of_b, None


def _addmm(result: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """`result + narrow wide`; the result may be changed in place."""
    if torch.compiler.is_compiling():
        # A compiled sum becomes part of whatever comes next, and a compiled `addmm` would copy the result first. The
        # compiler does not make one of sums in float32, in which it adds anyway.
        return (result.float() + (narrow @ wide).float()).to(result.dtype)
    return result.addmm_(narrow, wide)


def _slopes(flat: Tensor, x: Tensor, narrow: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x A^T`, of A and of B, from that of the output, shape (n, O)."""
    of_narrow = (flat @ b).mul_(scaling)
    return of_narrow, of_narrow.T @ x.reshape(-1, x.shape[-1]), (flat.T @ narrow).mul_(scaling)
