"""Reading from a loaded model what variants need to know of it."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftchat.errors import UserError
from peftchat.models.added_tokens import unfreeze_added_tokens
from peftchat.models.lora_init import CalibrationBatches, initialize_adapter, precompute_init
from peftchat.models.zero import is_zero3
from peftchat.variants import get_variant
from peftchat.variants.base import ModelShape

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from peftchat.recipe import Recipe


def model_shape(model: "PreTrainedModel") -> ModelShape:
    """Names and sizes of the model's layers; its weights may be quantized, sliced, or not there at all."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    norms: list[str] = []
    transposed = False
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            linear[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linear[name] = (module.nx, module.nf)
            transposed = True
        elif "norm" in type(module).__name__.lower() and "weight" in dict(module.named_parameters(recurse=False)):
            norms.append(name)
    return ModelShape(
        family=str(model.config.model_type),
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        linear=linear,
        norms=tuple(norms),
        transposed=transposed,
    )


def freeze_layers(model: "PreTrainedModel", layers: str | None) -> None:
    """Leave decoder layers out of training.

    Args:
        layers: numbers and ranges, such as `0-11,14`; None freezes nothing.

    Raises:
        UserError: the model has no such layers.
    """
    if layers is None:
        return
    blocks = _decoder_layers(model)
    chosen = {number for part in layers.split(",") for number in _numbers(part)}
    if max(chosen) >= len(blocks):
        raise UserError(
            f"the model's layers are 0 to {len(blocks) - 1}, and {max(chosen)} is none of them",
            where="model.freeze_layers",
        )
    for number in chosen:
        blocks[number].requires_grad_(False)


def _numbers(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The list of decoder layers: the one whose length the config tells."""
    count = int(model.config.get_text_config().num_hidden_layers)
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UserError("the model's layers are not a list that can be counted", where="model.freeze_layers")
    return found[0]


def peft_config(recipe: "Recipe", model: "PreTrainedModel") -> "PeftConfig | None":
    """The stock PEFT config for the recipe's `adapter` section on this model; None where PEFT has no part.

    Raises:
        UserError: the variant does not find the layers that it works on.
    """
    from peft import TaskType

    assert recipe.adapter is not None
    variant = get_variant(recipe.adapter.variant)
    if variant.build is None:
        return None
    try:
        config = variant.build(recipe.adapter, model_shape(model))
    except (ValueError, TypeError) as error:
        raise adapter_mismatch(recipe, error) from error
    config.task_type = TaskType.CAUSAL_LM
    config.base_model_name_or_path = recipe.model.name
    config.revision = recipe.model.revision
    return config


def add_adapter(
    recipe: "Recipe", model: "PreTrainedModel", batches: CalibrationBatches, checkpoint: Path | None
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
        UserError: the adapter does not fit the model.
    """
    from peft import get_peft_model

    config = peft_config(recipe, model)
    if config is None:
        return model
    assert recipe.adapter is not None
    variant = get_variant(recipe.adapter.variant)
    try:
        precompute_init(recipe, model, config, batches, checkpoint)
        wrapped = get_peft_model(model, config)
        if variant.start is not None:
            initialize_adapter(recipe, wrapped, batches, checkpoint)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise adapter_mismatch(recipe, error) from error
    unfreeze_added_tokens(model)
    if not is_zero3():
        # Small steps round to nothing in 16 bits. Under ZeRO-3 the optimizer holds the float32 values.
        cast_trainable(wrapped, torch.float32)
    return wrapped


def cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is trained of a model in a dtype of its own."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def adapter_mismatch(recipe: "Recipe", error: Exception) -> UserError:
    """What to tell of an error that PEFT raised when it put the recipe's adapter into the model."""
    if isinstance(error, UserError):
        return error
    assert recipe.adapter is not None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return UserError(
        f"the adapter does not fit the model: {lines[0]}",
        where=f"adapter: {recipe.adapter.variant}",
        hint="Use `target_modules: all-linear`, or names of the model's own linear layers; "
        f"`peftchat variants {recipe.adapter.variant}` tells what the variant takes.",
    )
