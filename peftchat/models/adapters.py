"""A variant around a frozen base: the stock PEFT model that is trained."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftchat.errors import UserError
from peftchat.models.facts import model_facts
from peftchat.models.rows import train_rows
from peftchat.models.starts import RowBatches, begin, prepare
from peftchat.models.zero import is_zero3
from peftchat.variants import get_variant

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from peftchat.recipe import Recipe


def peft_config(recipe: "Recipe", model: "PreTrainedModel") -> "PeftConfig | None":
    """The stock PEFT config for the recipe's `adapter` section on this model; None where PEFT has no part.

    Raises:
        InputError: the variant does not find the layers that it works on.
    """
    from peft import TaskType

    assert recipe.adapter is not None
    variant = get_variant(recipe.adapter.variant)
    if variant.build is None:
        return None
    try:
        config = variant.build(recipe.adapter, model_facts(model))
    except (ValueError, TypeError) as error:
        raise misfit(recipe, error) from error
    config.task_type = TaskType.CAUSAL_LM
    config.base_model_name_or_path = recipe.model.name
    config.revision = recipe.model.revision
    return config


def wrap(
    recipe: "Recipe", model: "PreTrainedModel", batches: RowBatches, checkpoint: Path | None
) -> "PreTrainedModel | PeftModel":
    """Put the recipe's adapter around a frozen model that has its token rows already.

    Args:
        recipe: says which adapter.
        model: the base; its weights come out unchanged.
        batches: yields training rows, for variants that begin at what they find in them.
        checkpoint: a checkpoint whose values will be loaded, which makes looking for a start unnecessary.

    Returns:
        The wrapped model; the base itself where only token rows are trained.

    Raises:
        InputError: the adapter does not fit the model.
    """
    from peft import get_peft_model

    config = peft_config(recipe, model)
    if config is None:
        return model
    assert recipe.adapter is not None
    variant = get_variant(recipe.adapter.variant)
    try:
        prepare(recipe, model, config, batches, checkpoint)
        wrapped = get_peft_model(model, config)
        if variant.start is not None:
            begin(recipe, wrapped, batches, checkpoint)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise misfit(recipe, error) from error
    train_rows(model)
    if not is_zero3():
        # Small steps round to nothing in 16 bits. Under ZeRO-3 the optimizer holds the float32 values.
        hold_trained_in(wrapped, torch.float32)
    return wrapped


def hold_trained_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is trained of a model in a dtype of its own."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def misfit(recipe: "Recipe", error: Exception) -> UserError:
    """What to tell of an error that PEFT raised when it put the recipe's adapter into the model."""
    if isinstance(error, UserError):
        return error
    assert recipe.adapter is not None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return UserError(
        f"the adapter does not fit the model: {lines[0]}",
        where=f"adapter: {recipe.adapter.variant}",
        cure="Use `target_modules: all-linear`, or names of the model's own linear layers; "
        f"`peftchat variants {recipe.adapter.variant}` tells what the variant takes.",
    )
