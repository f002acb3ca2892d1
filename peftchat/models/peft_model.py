"""A loaded model and its adapter: the sizes that settings depend on, frozen layers, and PEFT's wrapper."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftchat.errors import UserError
from peftchat.models.added_tokens import find_added_tokens, unfreeze_added_tokens
from peftchat.models.experts import (
    expert_parameters,
    flat_expert_names,
    names_peft_replaces,
    router_names,
)
from peftchat.models.read_weights import layers_not_called
from peftchat.models.zero import is_zero3, unsharded_shape
from peftchat.variants.base import Adapter, CalibrationBatches
from peftchat.variants.model_shape import ModelShape, is_target

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from peftchat.recipe import Recipe


def model_shape(model: "PreTrainedModel") -> ModelShape:
    """Return names and sizes of the model's layers. Its weights may be quantized, partitioned, or missing."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    norms: list[str] = []
    elsewhere: list[str] = []
    others = other_modalities(model)
    is_conv1d = False
    for name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower() and "weight" in dict(module.named_parameters(recurse=False))
        if any(name.startswith(f"{other}.") or name == other for other in others):
            if is_norm or isinstance(module, nn.Linear | Conv1D):
                elsewhere.append(name)
        elif isinstance(module, nn.Linear) and module is not head:
            linear[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linear[name] = (module.nx, module.nf)
            is_conv1d = True
        elif is_norm:
            norms.append(name)
    return ModelShape(
        model_type=str(model.config.model_type),
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        linear=linear,
        norms=tuple(norms),
        is_conv1d=is_conv1d,
        experts={name: unsharded_shape(parameter) for name, parameter in expert_parameters(model).items()},
        routers=router_names(model),
        renamed=names_peft_replaces(str(model.config.model_type)),
        flat_experts=flat_expert_names(model),
        not_called=layers_not_called(model),
        elsewhere=tuple(elsewhere),
        modules=tuple(name for name, _ in model.named_modules() if name),
    )


def other_modalities(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the dotted names of the modules beside the language model, such as a vision tower: text passes none."""
    if model.config.get_text_config() is model.config:
        return ()
    modules = dict(model.named_modules())
    decoder = model.get_decoder()
    inside = next((name for name, module in modules.items() if module is decoder), "")
    if not inside:
        return ()
    head = model.get_output_embeddings()
    around = {inside, *(".".join(inside.split(".")[:end]) for end in range(inside.count(".") + 1))}
    return tuple(
        name
        for name, module in modules.items()
        if name not in around and name.rpartition(".")[0] in around - {inside} and module is not head
    )


def freeze_layers(model: "PreTrainedModel", layers: str | None) -> None:
    """Freeze decoder layers, and the parts of a model that text does not pass.

    Args:
        layers: numbers and ranges, such as `0-11,14`; None freezes none of them.

    Raises:
        UserError: the model has no such layers.
    """
    for name in other_modalities(model):
        model.get_submodule(name).requires_grad_(False)
    if layers is None:
        return
    blocks = _decoder_layers(model)
    chosen = {number for part in layers.split(",") for number in _numbers(part)}
    if max(chosen) >= len(blocks):
        raise UserError(
            f"the model has no layer {max(chosen)}: its layers are 0 to {len(blocks) - 1}",
            where="model.freeze_layers",
        )
    for number in chosen:
        blocks[number].requires_grad_(False)


def _numbers(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """Return the list of decoder layers: the one with as many entries as the config has layers."""
    count = int(model.config.get_text_config().num_hidden_layers)
    others = tuple(f"{name}." for name in other_modalities(model))
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not name.startswith(others)
    ]
    if not found:
        raise UserError("this model has no list of decoder layers", where="model.freeze_layers")
    return found[0]


def peft_config(recipe: "Recipe", model: "PreTrainedModel") -> "PeftConfig | None":
    """Return the stock PEFT config for the recipe's `adapter` section on this model; None where PEFT has no part.

    Raises:
        UserError: the settings do not fit the model.
    """
    from peft import TaskType

    assert recipe.adapter is not None
    shape = model_shape(model)
    try:
        config = recipe.adapter.peft_config(shape)
    except (ValueError, TypeError) as error:
        raise adapter_mismatch(recipe, error) from error
    if config is not None:
        check_quantized_targets(recipe, config, shape)
        _check_vocabulary_targets(model, config)
        config.task_type = TaskType.CAUSAL_LM
        config.base_model_name_or_path = recipe.model.name
        config.revision = recipe.model.revision
    return config


def _check_vocabulary_targets(model: "PreTrainedModel", config: "PeftConfig") -> None:
    """Refuse an adapter on the LM head, whose weight is read without it, or on embeddings that lack added tokens.

    Raises:
        UserError: names the module.
    """
    head = model.get_output_embeddings()
    has_added_tokens = find_added_tokens(model) is not None
    targets = getattr(config, "target_modules", None)
    for name, module in model.named_modules():
        is_refused = module is head or (has_added_tokens and isinstance(module, nn.Embedding))
        if is_refused and not isinstance(targets, str) and any(is_target(name, target) for target in targets or ()):
            why = "its weight is read without the adapter" if module is head else "PEFT's adapter has no added tokens"
            raise UserError(
                f"`{name}` cannot have an adapter: {why}", where="adapter.target_modules", hint="Remove it."
            )


def adapter_notes(recipe: "Recipe", model: "PreTrainedModel") -> tuple[str, ...]:
    """Return what the user must know of layers without an adapter, and of the experts of a mixture.

    Raises:
        UserError: the adapter does not fit the model.
    """
    shape = model_shape(model)
    if recipe.adapter is None:
        return ()
    notes: list[str] = []
    if shape.not_called and hasattr(recipe.adapter, "target_modules"):
        frozen = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in shape.not_called))
        notes.append(f"Without an adapter: {frozen}. This {shape.model_type} reads their weights without calling them.")
    if not shape.experts:
        return tuple(notes)
    config = peft_config(recipe, model)
    targets: tuple[str, ...] = tuple(getattr(config, "target_parameters", None) or ())
    adapted = [name for name in shape.experts if any(is_target(name, target) for target in targets)]
    if len(adapted) < len(shape.experts):
        frozen = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in shape.experts if name not in adapted))
        notes.append(f"The experts' {frozen} stay frozen, as adapter.{_why_frozen(recipe.adapter)} says.")
    if recipe.method == "qlora":
        notes.append("The experts stay in 16 bits: bitsandbytes quantizes linear layers alone.")
    return tuple(notes)


def _why_frozen(adapter: "Adapter") -> str:
    modules = getattr(adapter, "target_modules", None)
    if modules is None:
        return f"variant: {adapter.variant}"
    return f"target_modules: {modules if isinstance(modules, str) else ', '.join(modules)}"


def check_quantized_targets(recipe: "Recipe", config: "PeftConfig", shape: ModelShape) -> None:
    """Refuse an adapter on the weights of quantized linear layers as parameters.

    Raises:
        UserError: names one of these layers.
    """
    if recipe.quantization is None:
        return
    layer = layer_as_parameter(config, shape)
    if layer is not None:
        raise UserError(
            f"`{layer}` of this `{shape.model_type}` cannot be adapted in {recipe.quantization.bits} bits: PEFT "
            "takes its name for one of an expert's layers, and reaches it only as an unquantized parameter",
            where="method: qlora",
            hint="Use method: lora, or set target_modules: attention.",
        )


def layer_as_parameter(config: "PeftConfig", shape: ModelShape) -> str | None:
    """Return a linear layer that PEFT adapts as a parameter, which must not be quantized; None if there is none."""
    for target in getattr(config, "target_parameters", None) or ():
        layer = target.removesuffix(".weight")
        if layer != target and any(is_target(name, layer) for name in shape.linear):
            return str(layer)
    return None


def add_adapter(
    recipe: "Recipe", model: "PreTrainedModel", batches: CalibrationBatches, checkpoint: Path | None
) -> "PreTrainedModel | PeftModel":
    """Put the recipe's adapter around a frozen model that has the embeddings of its added tokens already.

    Args:
        recipe: says which adapter.
        model: the base; its weights stay as they are.
        batches: yields training examples, for variants whose initialization reads them.
        checkpoint: a checkpoint whose values will be loaded, so that no initialization is needed.

    Returns:
        The wrapped model; the base itself where only embeddings of added tokens are trained.

    Raises:
        UserError: the adapter does not fit the model.
    """
    config = peft_config(recipe, model)
    if config is None:
        return model
    adapter = recipe.adapter
    assert adapter is not None
    try:
        if checkpoint is None:
            adapter.precompute_init(model, config, batches)
        else:
            adapter.restore_init(config, checkpoint)
        wrapped = adapter.wrap(model, config)
        if checkpoint is None:
            adapter.initialize(wrapped, batches)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise adapter_mismatch(recipe, error) from error
    unfreeze_added_tokens(model)
    if not is_zero3():
        # Small steps round to nothing in 16 bits. Under ZeRO-3 the optimizer holds the float32 values.
        cast_trainable(wrapped, torch.float32)
    return wrapped


def wrap_without_init(recipe: "Recipe", model: "PreTrainedModel") -> "PreTrainedModel | PeftModel":
    """Put the recipe's adapter around a model without weights, for an estimate of its memory.

    Raises:
        UserError: the adapter does not fit the model.
    """
    config = peft_config(recipe, model)
    if config is None:
        return model
    assert recipe.adapter is not None
    try:
        return recipe.adapter.wrap(model, config)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise adapter_mismatch(recipe, error) from error


def cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the trained parameters of a model to a dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def adapter_mismatch(recipe: "Recipe", error: Exception) -> UserError:
    """Return the error for the user where PEFT could not put the recipe's adapter into the model."""
    if isinstance(error, UserError):
        return error
    assert recipe.adapter is not None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return UserError(
        f"the adapter does not fit the model: {lines[0]}",
        where=f"adapter: {recipe.adapter.variant}",
        hint="Use `target_modules: all-linear`, or names of the model's own linear layers; "
        f"`peftchat variants {recipe.adapter.variant}` lists the settings of the variant.",
    )
