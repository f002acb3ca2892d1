"""Memory tracing: run a few layers on fake tensors and count the bytes.

The bytes that autograd saves come from the model's own code, for any architecture and adapter, without weights. Three
things that fake tensors cannot run are replaced: fused attention, quantized products, and the mask of packed sequences.
"""

import copy
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftchat.models.added_tokens import AddedTokenEmbeddings, AddedTokenHead, register_hooks, unfreeze_added_tokens
from peftchat.models.backbone import backbone_of
from peftchat.models.fused_lora import fuse_lora_forward
from peftchat.models.peft_model import cast_trainable, wrap_without_init
from peftchat.planning.settings import AttentionKind
from peftchat.training.linear_cross_entropy import linear_cross_entropy
from peftchat.training.lm_head import Head, LogitTransform

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    from peftchat.planning.settings import TraceConfig
    from peftchat.recipe import Recipe


_FUSED = "peftchat_fake_fused"


def fake_model(
    config: "PretrainedConfig", recipe: "Recipe", trace_config: "TraceConfig", layers: int
) -> "PreTrainedModel":
    """Build a few layers of the architecture with the recipe's adapter.

    The caller must be inside a `FakeTensorMode`.

    Args:
        config: the base model's config.
        recipe: its method and adapter.
        trace_config: dtypes, attention, quantization, checkpointing and added tokens.
        layers: decoder blocks.
    """
    model = meta_model(shallow(config, layers), getattr(torch, trace_config.weight_dtype), trace_config.attention)
    wrapped: nn.Module = model
    if recipe.method != "full":
        model.requires_grad_(False)
        wrapped = wrap(model, recipe, trace_config.new_tokens)
    materialize_fakes(
        wrapped, None if trace_config.trainable_dtype is None else getattr(torch, trace_config.trainable_dtype)
    )
    if trace_config.quantized:
        _quantize(model)
    if isinstance(wrapped, PeftModel) and trace_config.fused_lora:
        fuse_lora_forward(wrapped)
    if trace_config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if recipe.method != "full":
            model.enable_input_require_grads()
    return model.train()


def shallow(config: "PretrainedConfig", layers: int) -> "PretrainedConfig":
    """Return the config of the same model with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = kinds[-layers:]
    return config


def meta_model(
    config: "PretrainedConfig", dtype: torch.dtype, attention: AttentionKind = "masked"
) -> "PreTrainedModel":
    """Build the full architecture on torch's `meta` device.

    It has shapes and dtypes, but takes no memory.
    """
    from transformers import AutoModelForCausalLM

    _register_attention()
    names = {"fused": _FUSED, "masked": "sdpa", "eager": "eager"}
    if needs_eager_attention(config):
        attention = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=names[attention])


def needs_eager_attention(config: "PretrainedConfig") -> bool:
    """Return whether the architecture has no attention but its own, as GPT-OSS with its sinks."""
    from transformers import AutoModelForCausalLM

    try:
        architecture = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return False
    return not getattr(architecture, "_supports_sdpa", True)


def wrap(model: "PreTrainedModel", recipe: "Recipe", new_tokens: int) -> nn.Module:
    """Add added-token embeddings and the recipe's adapter to a frozen model.

    The model is on the `meta` device. This follows `peftchat.models.peft_model.add_adapter`, without the adapter's
    initialization.

    Raises:
        UserError: the adapter does not fit the model.
    """
    with torch.device("meta"):
        if new_tokens:
            _attach_embeddings(model, new_tokens)
        wrapped = wrap_without_init(recipe, model)
    if wrapped is not model:
        unfreeze_added_tokens(model)
        cast_trainable(wrapped, torch.float32)
    return wrapped


def materialize_fakes(model: nn.Module, trainable_dtype: torch.dtype | None) -> None:
    """Replace `meta` parameters and buffers by fake CPU tensors.

    Tied weights stay tied.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                cast = trainable_dtype is not None and parameter.requires_grad
                dtype = trainable_dtype if cast else parameter.dtype
                fake = torch.empty(parameter.shape, dtype=dtype)
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _attach_embeddings(model: "PreTrainedModel", count: int) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vocab_size, width = embedding.shape
    outputs = None if head is embedding else torch.empty(count, head.shape[1])
    ids = range(vocab_size, vocab_size + count)
    register_hooks(model, AddedTokenEmbeddings(ids, torch.empty(count, width), outputs, None, vocab_size))


def _quantize(model: "PreTrainedModel") -> None:
    """Make frozen linear layers dequantize their weight for each product.

    bitsandbytes does so too. The LM head is not quantized.
    """
    for module in decoder_linears(model):
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.__class__ = _QuantizedLinear


class _QuantizedLinear(nn.Linear):
    """A linear layer whose weight is dequantized for each product and not saved."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _QuantizedProduct.apply(x.to(self.weight.dtype), self)
        return product


class _QuantizedProduct(torch.autograd.Function):
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


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Enter the mode for building and running a fake model.

    Products of all experts at once run as transformers' own operator, which saves the same tensors: torch's operator
    refuses fake tensors in float32 (https://github.com/pytorch/pytorch/issues/174763).
    """
    from transformers.integrations import moe

    with FakeTensorMode() as mode, patch.object(moe, "_can_use_grouped_mm", lambda *_: False):
        yield mode


def decoder_linears(model: "PreTrainedModel") -> "list[nn.Linear | Conv1D]":
    """Return the linear layers of the blocks, without the LM head.

    GPT-2's `Conv1D` layers are included.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]


class LiveBytes(TorchDispatchMode):
    """Counts the live bytes of storages that are created inside the context.

    Attributes:
        now: bytes alive.
        peak: the most bytes alive since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, model: nn.Module) -> None:
        """Exclude the weights and buffers of a model."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._watch(tensor.untyped_storage(), count=False)

    def reset_peak(self) -> None:
        """Set the peak to the bytes alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage(), count=True)
        return result

    def _watch(self, storage: Any, *, count: bool) -> None:
        # The Python object of a storage lives exactly as long as the storage.
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if count else 0
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True, slots=True)
class BackboneTrace:
    """Bytes of a step through the backbone (all layers, without the LM head).

    Attributes:
        forward_peak: the peak of the forward pass.
        saved: alive after it, including the last hidden states.
        first_layer_peak: the peak while the gradient passes the last layer, which is first in the backward pass.
        rest_peak: the peak from there to the end.
        gradients: alive at the end: gradients of the trainable weights.
    """

    forward_peak: int
    saved: int
    first_layer_peak: int
    rest_peak: int
    gradients: int


def trace_backbone(model: "PreTrainedModel", batch: int, length: int, autocast: torch.dtype | None) -> BackboneTrace:
    """Trace forward and backward of a fake model on ids of shape (batch, length).

    The caller must be inside the model's `FakeTensorMode`.
    """
    live = LiveBytes()
    live.ignore(model)
    layers = decoder_layers(model)
    marks: list[int] = []

    def at_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if states.requires_grad:
            states.register_hook(passed)

    def passed(_: Tensor) -> None:
        marks.append(live.peak)
        live.reset_peak()

    handle = layers[-1].register_forward_pre_hook(at_input, with_kwargs=True)
    ids = torch.empty(batch, length, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": torch.empty_like(ids)}
    with live:
        if model.config._attn_implementation in ("sdpa", "eager"):
            inputs["attention_mask"] = _mask(model, batch, length)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            hidden = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
        del inputs
        forward_peak, saved = live.peak, live.now
        live.reset_peak()
        handle.remove()
        gradient = torch.empty_like(hidden)
        hidden.backward(gradient)
        del hidden, gradient
        first = marks[0] if marks else live.peak
        return BackboneTrace(forward_peak, saved, first, live.peak, live.now)


def _mask(model: "PreTrainedModel", batch: int, length: int) -> Tensor:
    """Return the mask that isolates packed conversations.

    As in transformers, it is bool for SDPA and float for eager attention.
    """
    eager = model.config._attn_implementation == "eager"
    return torch.empty(batch, 1, length, length, dtype=model.dtype if eager else torch.bool)


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """Return the decoder blocks of the model."""
    depth = model.config.get_text_config().num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)


@dataclass(frozen=True, slots=True)
class LossTrace:
    """Bytes that LM head and loss add to the saved activations of the backbone.

    Attributes:
        forward: the peak while the loss is computed.
        backward: the peak while its gradient is computed.
        gradients: alive after it: gradients of a trainable LM head and of added-token embeddings.
    """

    forward: int
    backward: int
    gradients: int


def trace_loss(
    config: "PretrainedConfig",
    *,
    targets: int,
    head: tuple[int, int],
    weight_dtype: torch.dtype,
    autocast: torch.dtype | None,
    trains_head: bool,
    new_tokens: int,
    in_tiles: bool,
) -> LossTrace:
    """Trace forward and backward of the loss over `targets` supervised positions.

    The caller must be inside a `FakeTensorMode`.

    Args:
        config: the base model's config.
        targets: supervised positions.
        head: vocabulary size and width.
        weight_dtype: dtype of the LM head.
        autocast: dtype of autocast; None without it.
        trains_head: whether the LM head gets a gradient.
        new_tokens: added tokens with embeddings of their own, if the head is frozen.
        in_tiles: whether float32 logits exist for a part of a chunk at a time, as on a CPU.
    """
    vocab_size, width = head
    weight = nn.Parameter(torch.empty(vocab_size, width, dtype=weight_dtype), requires_grad=trains_head)
    added = None
    if new_tokens and not trains_head:
        own = nn.Parameter(torch.empty(new_tokens, width))
        added = AddedTokenHead(own, None, torch.empty(new_tokens, dtype=torch.int64), vocab_size + new_tokens)
    states = torch.empty(targets, width, dtype=autocast or weight_dtype, requires_grad=True)
    target_ids, positions = torch.empty(2, targets, dtype=torch.int64)
    live = LiveBytes()
    with live:
        live.ignore(nn.ParameterList([weight, states, *([] if added is None else [added.weight])]))
        # In training the states are selected from all positions, which copies them.
        selected = states.index_select(0, positions)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            lm_head = Head(weight, None, added, LogitTransform.of(config), in_tiles=in_tiles)
            loss, _ = linear_cross_entropy(selected, target_ids, lm_head)
        del selected
        forward = live.peak
        live.reset_peak()
        loss.backward()
    gradients = [weight.grad, None if added is None else added.weight.grad]
    gradient_bytes = sum(gradient.numel() * gradient.element_size() for gradient in gradients if gradient is not None)
    return LossTrace(forward, live.peak, gradient_bytes)
