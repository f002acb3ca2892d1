"""Fused LoRA: base layer and adapter as one differentiable operation, in the dtype of the activations.

PEFT computes `result + B(A(x)) * scaling`. Per layer that takes three tensors of the output's size besides the result.
Under autocast, `x` is also copied to the adapter's float32 and back. Here one matrix product adds the adapter's output.
The layers, their weights and the saved files stay PEFT's own.

In bfloat16 PEFT rounds the base's output, and then the sum, so that an adapter that adds less than half a unit in the
last place adds nothing: about four fifths of what the first steps of LoRA change. Here a linear layer, or one of 4 bits
whose weight is dequantized for each pass, and its adapter are rounded once, together. One of 8 bits rounds twice.
"""

import types
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peftchat.models.zero import gather_together, is_zero3


def fuse_lora_forward(model: PeftModel) -> int:
    """Replace the forward of the model's plain LoRA layers; return the number of these layers.

    Layers that compute more than `result + B(A(x)) * scaling` keep theirs: DoRA and other LoRA variants, adapters with
    a bias, several adapters, embeddings. A layer whose adapter is disabled or merged also runs PEFT's forward.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
        if is_zero3():
            # The modules of the base and of the adapter, whose weights are needed, are not called themselves.
            gather_together(layer)
    return len(layers)


def switch_fused(model: nn.Module, *, on: bool) -> None:
    """Run layers that `fuse_lora_forward` has changed with their adapter as one operation, or as PEFT does."""
    for layer in model.modules():
        if isinstance(forward := vars(layer).get("forward"), types.MethodType) and forward.__func__ in _FORWARDS:
            layer.forward = types.MethodType(_forward if on else _forward_of_class, layer)


def has_fused_layers(model: nn.Module) -> bool:
    """Return whether layers run with their adapter as one operation."""
    forwards = (vars(layer).get("forward") for layer in model.modules())
    return any(getattr(forward, "__func__", None) is _forward for forward in forwards)


def num_adapted_layers(model: PeftModel) -> int:
    """Return the number of layers that have an adapter."""
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
    # PEFT defines these classes only where bitsandbytes is installed.
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and type(module).__module__ == "peft.tuners.lora.bnb"


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
        return _forward_of_class(self, x, *args, **kwargs)
    name = self.active_adapters[0]
    lora_input = self.lora_dropout[name](x)
    adapter = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    base = self.base_layer
    dropped = None if lora_input is x else lora_input
    if type(base) is nn.Linear and not base.weight.requires_grad:
        output: Tensor = _LinearWithLora.apply(x, dropped, base.weight, None, base.bias, *adapter)
    elif (dtype := _four_bit_dtype(base, x)) is not None:
        # It computes in its own dtype, whatever autocast says.
        with torch.autocast(x.device.type, enabled=False):
            output = _LinearWithLora.apply(
                x.to(dtype), dropped, base.weight, base.weight.quant_state, base.bias, *adapter
            ).to(x.dtype)
    else:
        result = base(x, *args, **kwargs)
        output = _AddLora.apply(lora_input, result.reshape(-1, result.shape[-1]), *adapter)
    # Some models change the output in place. Autograd allows that for a view made here, not for one made in a function.
    return output.view(*x.shape[:-1], -1)


# For fewer rows, as when an answer is written, bitsandbytes has kernels that do not dequantize the weight.
_MANY_ROWS = 64


def _four_bit_dtype(layer: Any, x: Tensor) -> torch.dtype | None:
    """Return the dtype in which a 4-bit layer computes; None for other layers, and where its own kernels are better."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if type(layer).__name__ != "Linear4bit" or state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    if not torch.is_grad_enabled() and x.numel() < _MANY_ROWS * x.shape[-1]:
        return None
    if not layer.compute_type_is_set:
        # As in the layer's own forward: the first input decides.
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    dtype: torch.dtype = layer.compute_dtype or x.dtype
    # To a wider dtype, bitsandbytes dequantizes directly, which a cast of the narrower one would not give.
    return dtype if dtype.itemsize <= state.dtype.itemsize else None


def _forward_of_class(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = type(self).forward(self, x, *args, **kwargs)
    return result


_FORWARDS = (_forward, _forward_of_class)


class _AddLora(torch.autograd.Function):
    """`result + (x A^T) B^T * scaling`.

    Shapes: x (..., I), result and output (n, O) for n rows of x, A (r, I), B (O, r). The products are computed in the
    dtype of the result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        dtype = result.dtype
        with torch.autocast(x.device.type, enabled=False):
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
            lora_a_out = x.reshape(-1, x.shape[-1]) @ a.T
            output = torch.addmm(result, lora_a_out, b.T, alpha=scaling)
        ctx.save_for_backward(x, lora_a_out, a, b)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a_out, a, b = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_lora_a_out, grad_a, grad_b = _lora_gradients(grad_output, x, lora_a_out, b, ctx.scaling)
        grad_x = (grad_lora_a_out @ a).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_output, grad_a, grad_b, None


class _LinearWithLora(torch.autograd.Function):
    """A frozen linear layer and its adapter together, rounded once, so that the gradient of `x` is one tensor.

    Shapes: x (..., I), dropped (..., I) or None, weight (O, I), bias (O,) or None, A (r, I), B (O, r), output (n, O)
    for n rows of x. `dropped` is what the adapter gets under dropout in place of x. With a quantization state of
    bitsandbytes, the weight is dequantized for each pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        quant_state: Any,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
            lora_input = x if dropped is None else dropped.to(dtype)
            lora_a_out = lora_input.reshape(-1, x.shape[-1]) @ a.T
            output = _addmm(
                (lora_a_out * scaling) @ b.T, x.reshape(-1, x.shape[-1]), _dense(weight, quant_state, dtype).T
            )
            if bias is not None:
                output += bias.to(dtype)
        ctx.save_for_backward(lora_input, lora_a_out, weight, a, b)
        ctx.scaling, ctx.is_dropped, ctx.quant_state, ctx.dtype = scaling, dropped is not None, quant_state, dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        lora_input, lora_a_out, weight, a, b = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_lora_a_out, grad_a, grad_b = _lora_gradients(grad_output, lora_input, lora_a_out, b, ctx.scaling)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            weight = _dense(weight, ctx.quant_state, ctx.dtype)
        if ctx.is_dropped:
            grad_dropped = (grad_lora_a_out @ a).view(lora_input.shape) if ctx.needs_input_grad[1] else None
            grad_x = (grad_output @ weight).view(lora_input.shape) if ctx.needs_input_grad[0] else None
        elif ctx.needs_input_grad[0]:
            grad_x = _addmm(grad_lora_a_out @ a, grad_output, weight).view(lora_input.shape)
        return grad_x, grad_dropped, None, None, None, grad_a, grad_b, None


def _dense(weight: Tensor, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """Return a weight of a linear layer, shape (O, I), from what is stored."""
    if quant_state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, quant_state).to(dtype)


def _addmm(lora_out: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return `lora_out + one @ other`, rounded once. What the adapter gives may be changed in place.

    The other order would round the product to bfloat16, and then the sum: an adapter that adds less than half a unit in
    the last place, as in the first steps of a run, would add nothing at all.
    """
    # Compiled, an operation in place would be a copy and a sum.
    return torch.addmm(lora_out, one, other) if torch.compiler.is_compiling() else lora_out.addmm_(one, other)


def _lora_gradients(
    grad_output: Tensor, x: Tensor, lora_a_out: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `x A^T`, of A and of B from that of the output, shape (n, O)."""
    grad_lora_a_out = (grad_output @ b).mul_(scaling)
    grad_a = grad_lora_a_out.T @ x.reshape(-1, x.shape[-1])
    return grad_lora_a_out, grad_a, (grad_output.T @ lora_a_out).mul_(scaling)
