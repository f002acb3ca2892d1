"""Decoder layers compiled one by one.

All layers of a model are the same program, so compiling one (torch's "regional compilation") takes seconds where
compiling the whole model takes minutes, and what stands around them may stay as it is: the embedding with its new
rows, the loss, gradient checkpointing. What is won is everything between the matrix products: norms, rotary positions,
gates, casts.
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
    """Let the model's layers run compiled where gradients are wanted; returns how many there are.

    Evaluation and generation run as before: every other kind of call would be compiled anew for a few uses.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = _Switch(layer.forward)
    return len(layers)


def has_compiled_layers(model: nn.Module) -> bool:
    """Whether `compile_layers` has changed the model."""
    return any(isinstance(vars(module).get("forward"), _Switch) for module in model.modules())


def missing_compiler(device: str) -> str | None:
    """What torch would need to compile for a device and does not find; None where everything is there."""
    if device == "cuda":
        return None if find_spec("triton") else "Triton"
    # The first that torch tries.
    return None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler"


class _Switch:
    """A layer's forward: compiled for training, as it was for anything else."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._plain = forward
        # Rows have lengths of their own; one program serves them all.
        self._compiled = torch.compile(forward, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if torch.is_grad_enabled() else self._plain)(*args, **kwargs)
