"""A model of shapes: the real architecture with one or two layers, its weights without storage.

What autograd keeps is then read off the model's own code, whatever the architecture and the adapter, without a
weight being loaded. Three things that a shape cannot run are stood in for: fused attention, quantised products, and
the mask of packed rows.
"""

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftchat.models.added_tokens import AddedTokenEmbeddings, register_hooks, unfreeze_added_tokens
from peftchat.models.fused_lora import fuse_lora_forward
from peftchat.models.lora_init import initialize_adapter
from peftchat.models.peft_model import adapter_mismatch, cast_trainable, peft_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    from peftchat.planning.activations import ActivationKey
    from peftchat.recipe import Recipe

AttentionKind = Literal["fused", "masked", "eager"]
"""`fused`: a kernel that keeps its inputs, its output and one number a query (Dao et al., 2022). `masked`: SDPA
with a mask of every pair of positions. `eager`: the scores of every pair are kept."""

_FUSED = "peftchat_shapes_fused"


def shadow_model(config: "PretrainedConfig", recipe: "Recipe", key: "ActivationKey", layers: int) -> "PreTrainedModel":
    """The architecture with `layers` layers, wrapped as training wraps it. To be called under a `FakeTensorMode`.

    Args:
        config: the base model's config.
        recipe: its method and adapter decide what is trained.
        key: dtypes, attention, quantisation, checkpointing, new rows.
    """
    model = on_meta(shallow(config, layers), getattr(torch, key.held), key.attention)
    wrapped: nn.Module = model
    if recipe.method != "full":
        model.requires_grad_(False)
        wrapped = wrap(model, recipe, key.new_tokens)
    give_fake_weights(wrapped, None if key.trained is None else getattr(torch, key.trained))
    if key.quantised:
        _quantise(model)
    if isinstance(wrapped, PeftModel) and key.branches_at_once:
        fuse_lora_forward(wrapped)
    if key.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if recipe.method != "full":
            model.enable_input_require_grads()
    return model.train()


def shallow(config: "PretrainedConfig", layers: int) -> "PretrainedConfig":
    """The config of the same model with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = kinds[-layers:]
    return config


def on_meta(config: "PretrainedConfig", held: torch.dtype, attention: AttentionKind = "masked") -> "PreTrainedModel":
    """The whole architecture on torch's `meta` device: shapes and dtypes, no memory."""
    from transformers import AutoModelForCausalLM

    _register_attention()
    names = {"fused": _FUSED, "masked": "sdpa", "eager": "eager"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=held, attn_implementation=names[attention])


def wrap(model: "PreTrainedModel", recipe: "Recipe", new_tokens: int) -> nn.Module:
    """Put new tokens' rows and the recipe's adapter into a frozen model on the `meta` device.

    As `peftchat.models.peft_model.add_adapter` does it, but no start of an adapter is looked for.

    Raises:
        InputError: the adapter does not fit the model.
    """
    assert recipe.adapter is not None
    with torch.device("meta"):
        if new_tokens:
            _attach_rows(model, new_tokens)
        config = peft_config(recipe, model)
        if config is None:
            return model
        try:
            wrapped = get_peft_model(model, config)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise adapter_mismatch(recipe, error) from error
        initialize_adapter(recipe, wrapped, _no_rows, Path())
    unfreeze_added_tokens(model)
    cast_trainable(wrapped, torch.float32)
    return wrapped


def _no_rows(_: int) -> "Iterator[dict[str, Tensor]]":
    return iter(())


def give_fake_weights(model: nn.Module, trained: torch.dtype | None) -> None:
    """Replace `meta` parameters and buffers by fake ones that believe to be on the CPU; ties stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                dtype = trained if trained is not None and parameter.requires_grad else parameter.dtype
                fake = torch.empty(parameter.shape, dtype=dtype)
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _attach_rows(model: "PreTrainedModel", count: int) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vocabulary, width = embedding.shape
    outputs = None if head is embedding else torch.empty(count, head.shape[1])
    ids = range(vocabulary, vocabulary + count)
    register_hooks(model, AddedTokenEmbeddings(ids, torch.empty(count, width), outputs, None, vocabulary))


def _quantise(model: "PreTrainedModel") -> None:
    """Let every frozen linear layer but the head make its weight anew for each product, as bitsandbytes does."""
    for module in decoder_linears(model):
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.__class__ = _QuantisedLinear


class _QuantisedLinear(nn.Linear):
    """A linear layer whose weight is made for each product and not kept."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _QuantisedProduct.apply(x.to(self.weight.dtype), self)
        return product


class _QuantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight.clone(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.clone(), None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


@functools.cache
def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_FUSED, _fused_attention)
    AttentionMaskInterface.register(_FUSED, _no_mask)


def fake_mode() -> FakeTensorMode:
    """The mode in which a shadow model is made and run."""
    return FakeTensorMode()


def decoder_linears(model: "PreTrainedModel") -> "list[nn.Linear | Conv1D]":
    """The linear layers of the blocks, those of GPT-2's class included; the head is none of them."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]
