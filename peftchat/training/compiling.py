"""Compiling a run's layers: as the recipe asks, and where they may be compiled without being asked."""

import os
from typing import TYPE_CHECKING

import torch

from peftchat.dataset.mixture import examples_per_epoch
from peftchat.errors import UserError
from peftchat.models.compiled import compile_layers, missing_compiler
from peftchat.training.distributed import DistributedSetup
from peftchat.training.throughput import count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftchat.dataset.encode import EncodingStats
    from peftchat.recipe import LoadedRecipe, Recipe

MIN_LONG_SECONDS = 150.0
"""Shortest training time that repays compiling, which takes about 20 seconds the first time and 5 later."""

_FAST_CORE_FLOPS = 2e11
"""Floating-point operations per second of a fast core in training. A constant, because all processes must agree."""


def compile_as_asked(loaded: "LoadedRecipe", distributed: DistributedSetup, model: "PreTrainedModel") -> None:
    """Compile the layers of a model whose recipe says `training.torch_compile: true`.

    Raises:
        UserError: they cannot be compiled.
    """
    missing = missing_compiler(distributed.device)
    where = f"{loaded.where('training', 'torch_compile')}: true"
    if missing:
        raise UserError(f"torch needs {missing} to compile", where=where, hint="Install it, or remove the key.")
    if distributed.uses_deepspeed:
        message = f"layers cannot be compiled under `{distributed.strategy}`"
        raise UserError(message, where=where, hint="Remove the key, or set distributed.strategy: ddp.")
    if not compile_layers(model):
        raise UserError("this model has no list of decoder layers to compile", where=where, hint="Remove the key.")


def may_compile(recipe: "Recipe", distributed: DistributedSetup) -> bool:
    """Return whether layers may be compiled without being asked: left open, on a CPU with a compiler."""
    # On a GPU compiling was never measured to be faster.
    is_open = recipe.training.torch_compile is None and not distributed.gpus and not distributed.uses_deepspeed
    return is_open and missing_compiler(distributed.device) is None


def has_matrix_tiles() -> bool:
    """Return whether the CPU has AMX and oneDNN may use it: there compiled layers were faster in every measurement."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX").upper()
    return ("AMX" in allowed or allowed in ("ALL", "DEFAULT")) and bool(torch.cpu._is_amx_tile_supported())


def least_training_seconds(
    recipe: "Recipe", distributed: DistributedSetup, model: "PreTrainedModel", stats: "EncodingStats"
) -> float:
    """Return the training time on fast cores, in seconds."""
    training = recipe.training
    share = examples_per_epoch(recipe, stats) / stats.examples
    tokens = stats.tokens * share * training.num_train_epochs
    if training.max_steps > 0:
        examples = training.per_device_train_batch_size * training.gradient_accumulation_steps * distributed.world_size
        length = recipe.data.max_length if recipe.data.packing else stats.tokens / stats.examples
        tokens = training.max_steps * examples * length
    if training.max_train_tokens is not None:
        tokens = min(tokens, training.max_train_tokens)
    flops_per_weight = 6 if recipe.method == "full" else 4
    flops = flops_per_weight * count_parameters(model) * tokens
    seconds = flops / (_FAST_CORE_FLOPS * (os.cpu_count() or 1))
    return min(seconds, training.max_train_minutes * 60) if training.max_train_minutes is not None else seconds
