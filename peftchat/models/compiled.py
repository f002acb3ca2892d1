"""Regional compilation: `torch.compile` for each decoder layer.

All layers of a model are the same program, so compiling one takes seconds where compiling the full model takes minutes.
The embedding with its added tokens, the loss and gradient checkpointing stay uncompiled. Compiled layers are faster
between their matrix products: norms, rotary positions, gates, casts.
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: nn.Module) -> int:
    """Run the model's decoder layers compiled where gradients are enabled; return the number of layers.

    Evaluation and generation stay uncompiled: each kind of call would be compiled again for a few uses.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if not isinstance(vars(layer).get("forward"), _CompiledForTraining):
            layer.forward = _CompiledForTraining(layer.forward)
    switch_compiled(model, on=True)
    return len(layers)


def switch_compiled(model: nn.Module, *, on: bool) -> None:
    """Run layers that `compile_layers` has changed compiled, or as they were; what is compiled stays."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _CompiledForTraining):
            forward.is_on = on


def has_compiled_layers(model: nn.Module) -> bool:
    """Return whether layers run compiled."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return any(isinstance(forward, _CompiledForTraining) and forward.is_on for forward in forwards)


def missing_compiler(device: str) -> str | None:
    """Return the compiler that torch needs for a device and cannot find, None if nothing is missing."""
    if device == "cuda":
        return None if find_spec("triton") else "Triton"
    # The first one that torch tries.
    return None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler"


class _CompiledForTraining:
    """A layer's forward, compiled while gradients are enabled and unchanged otherwise.

    Attributes:
        is_on: whether it is compiled at all.
    """

    is_on: bool = True

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._uncompiled = forward
        # Batches differ in length. One program with dynamic shapes serves them all.
        self._compiled = torch.compile(forward, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if self.is_on and torch.is_grad_enabled() else self._uncompiled)(*args, **kwargs)
