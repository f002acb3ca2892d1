"""Whether a run's layers are compiled."""

import os
from typing import TYPE_CHECKING

from peft import PeftModel

from peftchat.errors import UserError
from peftchat.formatting import format_duration
from peftchat.models.compiled import compile_layers, missing_compiler
from peftchat.runs.run_summary import AutoSetting
from peftchat.training.flops import parameters_of

if TYPE_CHECKING:
    from peftchat.dataset.encode import EncodingStats
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.training.build import Built
    from peftchat.training.placement import Placement

_WORTH_IT = 150.0
"""Seconds of steps from which on compiling (about 20 seconds the first time, 5 later) is won back."""

_QUICK_CORE = 2e11
"""Floating-point operations a second of a core that is quick at training. It is not measured: processes must agree."""


def compile_if_it_pays(
    loaded: "LoadedRecipe", placement: "Placement", built: "Built", stats: "EncodingStats", *, plain: bool
) -> AutoSetting | None:
    """Compile the model's layers where the recipe says so, or leaves it open and the run is long.

    Args:
        stats: of the training rows.
        plain: whether every adapted layer is of the kind that is known to compile.

    Returns:
        What was chosen and why; None where nothing was.

    Raises:
        InputError: the recipe wants compiled layers and cannot have them.
    """
    wanted = loaded.recipe.training.torch_compile
    if wanted is False:
        return None
    lacking = missing_compiler(placement.device)
    if wanted:
        where = f"{loaded.where('training', 'torch_compile')}: true"
        if lacking:
            raise UserError(f"torch needs {lacking} to compile", where=where, cure="Install it, or remove the key.")
        if placement.uses_deepspeed:
            why = f"under `{placement.strategy}` layers are never compiled"
            raise UserError(why, where=where, cure="Remove the key, or write `distributed.strategy: ddp`.")
        if not compile_layers(built.causal_model):
            raise UserError("this model's layers cannot be told apart", where=where, cure="Remove the key.")
        return None
    # Elsewhere it was never measured.
    if lacking or not plain or placement.gpus or placement.uses_deepspeed:
        return None
    seconds = _seconds_at_least(loaded.recipe, placement, built, stats)
    if seconds < _WORTH_IT or not compile_layers(built.causal_model):
        return None
    return AutoSetting("training.torch_compile", "true", f"the steps take at least {format_duration(seconds)}")


def _seconds_at_least(recipe: "Recipe", placement: "Placement", built: "Built", stats: "EncodingStats") -> float:
    """How long the steps take on quick cores."""
    training = recipe.training
    tokens = stats.tokens * training.num_train_epochs
    if training.max_steps > 0:
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * placement.world_size
        longest = recipe.data.max_length if recipe.data.packing else stats.tokens / stats.rows
        tokens = training.max_steps * rows * longest
    if training.max_tokens is not None:
        tokens = min(tokens, training.max_tokens)
    each = 4 if isinstance(built.model, PeftModel) else 6
    work = each * parameters_of(built.causal_model) * tokens
    seconds = work / (_QUICK_CORE * (os.cpu_count() or 1))
    return min(seconds, training.max_minutes * 60) if training.max_minutes is not None else seconds
