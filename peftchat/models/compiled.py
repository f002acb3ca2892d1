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
        layer.forward = _CompiledForTraining(layer.forward)
    return len(layers)


def has_compiled_layers(model: nn.Module) -> bool:
    """Return whether `compile_layers` has changed the model."""
    return any(isinstance(vars(module).get("forward"), _CompiledForTraining) for module in model.modules())


def missing_compiler(device: str) -> str | None:
    """Return the compiler that torch needs for a device and cannot find, None if nothing is missing."""
    if device == "cuda":
        return None if find_spec("triton") else "Triton"
    # The first one that torch tries.
    return None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler"


class _CompiledForTraining:
    """A layer's forward, compiled while gradients are enabled and unchanged otherwise."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._uncompiled = forward
        # Batches differ in length. One program with dynamic shapes serves them all.
        self._compiled = torch.compile(forward, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if torch.is_grad_enabled() else self._uncompiled)(*args, **kwargs)
