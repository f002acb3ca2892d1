"""A model of shapes: the real architecture with one or two layers, its weights without storage.

What autograd keeps is then read off the model's own code, whatever the architecture and the adapter, without a
weight being loaded. Three things that a shape cannot run are stood in for: fused attention, quantized products, and
the mask of packed rows.
"""

import copy
import functools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftchat.models.added_tokens import AddedTokenEmbeddings, AddedTokenHead, register_hooks, unfreeze_added_tokens
from peftchat.models.fused_lora import fuse_lora_forward
from peftchat.models.peft_model import cast_trainable, wrap_without_init
from peftchat.planning.settings import AttentionKind
from peftchat.training.lm_head import Head, LogitTransform
from peftchat.training.loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    from peftchat.planning.settings import TraceConfig
    from peftchat.recipe import Recipe


_FUSED = "peftchat_shapes_fused"


def fake_model(config: "PretrainedConfig", recipe: "Recipe", key: "TraceConfig", layers: int) -> "PreTrainedModel":
    """The architecture with `layers` layers, wrapped as training wraps it. To be called under a `FakeTensorMode`.

    Args:
        config: the base model's config.
        recipe: its method and adapter decide what is trained.
        key: dtypes, attention, quantization, checkpointing, new rows.
    """
    model = meta_model(shallow(config, layers), getattr(torch, key.held), key.attention)
    wrapped: nn.Module = model
    if recipe.method != "full":
        model.requires_grad_(False)
        wrapped = wrap(model, recipe, key.new_tokens)
    materialize_fakes(wrapped, None if key.trained is None else getattr(torch, key.trained))
    if key.quantized:
        _quantize(model)
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


def meta_model(config: "PretrainedConfig", held: torch.dtype, attention: AttentionKind = "masked") -> "PreTrainedModel":
    """The whole architecture on torch's `meta` device: shapes and dtypes, no memory."""
    from transformers import AutoModelForCausalLM

    _register_attention()
    names = {"fused": _FUSED, "masked": "sdpa", "eager": "eager"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=held, attn_implementation=names[attention])


def wrap(model: "PreTrainedModel", recipe: "Recipe", new_tokens: int) -> nn.Module:
    """Put new tokens' rows and the recipe's adapter into a frozen model on the `meta` device.

    As `peftchat.models.peft_model.add_adapter` does it, without the adapter's initialization.

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


def materialize_fakes(model: nn.Module, trained: torch.dtype | None) -> None:
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


def _attach_embeddings(model: "PreTrainedModel", count: int) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vocabulary, width = embedding.shape
    outputs = None if head is embedding else torch.empty(count, head.shape[1])
    ids = range(vocabulary, vocabulary + count)
    register_hooks(model, AddedTokenEmbeddings(ids, torch.empty(count, width), outputs, None, vocabulary))


def _quantize(model: "PreTrainedModel") -> None:
    """Let every frozen linear layer but the head make its weight anew for each product, as bitsandbytes does."""
    for module in decoder_linears(model):
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.__class__ = _QuantizedLinear


class _QuantizedLinear(nn.Linear):
    """A linear layer whose weight is made for each product and not kept."""

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


def fake_mode() -> FakeTensorMode:
    """The mode in which a shadow model is made and run."""
    return FakeTensorMode()


def decoder_linears(model: "PreTrainedModel") -> "list[nn.Linear | Conv1D]":
    """The linear layers of the blocks, those of GPT-2's class included; the head is none of them."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside the context and still alive.

    Attributes:
        now: bytes alive.
        peak: the most since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, model: nn.Module) -> None:
        """Leave out the weights and buffers of a model."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._watch(tensor.untyped_storage(), count=False)

    def restart(self) -> None:
        """Forget the peak."""
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
    """Bytes at the moments of a step through the backbone (all layers, without the head).

    Attributes:
        forward_peak: the most during the forward.
        saved: alive behind it, with the last hidden state.
        first_layer_peak: the most while the gradient passes the last layer, through which it goes first.
        rest_peak: the most from there to the end.
        gradients: alive at the end: the gradients of what is trained.
    """

    forward_peak: int
    saved: int
    first_layer_peak: int
    rest_peak: int
    gradients: int


def trace_backbone(model: "PreTrainedModel", batch: int, length: int, autocast: torch.dtype | None) -> BackboneTrace:
    """Run forward and backward of a shadow model on ids of shape (batch, length), under its `FakeTensorMode`."""
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
        live.restart()

    handle = layers[-1].register_forward_pre_hook(at_input, with_kwargs=True)
    ids = torch.empty(batch, length, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": torch.empty_like(ids)}
    with live:
        if model.config._attn_implementation in ("sdpa", "eager"):
            inputs["attention_mask"] = _mask(model, batch, length)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        del inputs
        forward_peak, saved = live.peak, live.now
        live.restart()
        handle.remove()
        gradient = torch.empty_like(hidden)
        hidden.backward(gradient)
        del hidden, gradient
        first = marks[0] if marks else live.peak
        return BackboneTrace(forward_peak, saved, first, live.peak, live.now)


def _mask(model: "PreTrainedModel", batch: int, length: int) -> Tensor:
    """The mask that keeps packed conversations apart, as transformers makes it for SDPA (bool) and eager (a float)."""
    eager = model.config._attn_implementation == "eager"
    return torch.empty(batch, 1, length, length, dtype=model.dtype if eager else torch.bool)


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The blocks of the model."""
    depth = model.config.get_text_config().num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)


@dataclass(frozen=True, slots=True)
class LossTrace:
    """Bytes that the head and the loss add to what the backbone keeps.

    Attributes:
        forward: the most while the loss is computed.
        backward: the most while its gradient is handed to the backbone.
        gradients: alive behind it: the gradients of a trained head and of new tokens' rows.
    """

    forward: int
    backward: int
    gradients: int


def trace_loss(
    config: "PretrainedConfig",
    *,
    targets: int,
    head: tuple[int, int],
    held: torch.dtype,
    autocast: torch.dtype | None,
    trains_head: bool,
    new_tokens: int,
) -> LossTrace:
    """Run the loss over `targets` supervised positions, forward and backward, under a `FakeTensorMode`.

    Args:
        head: vocabulary and width.
        held: dtype of the head.
        trains_head: whether the head gets a gradient.
        new_tokens: rows of their own, where the head is frozen.
    """
    vocabulary, width = head
    weight = nn.Parameter(torch.empty(vocabulary, width, dtype=held), requires_grad=trains_head)
    rows = None
    if new_tokens and not trains_head:
        own = nn.Parameter(torch.empty(new_tokens, width))
        rows = AddedTokenHead(own, None, torch.empty(new_tokens, dtype=torch.int64), vocabulary + new_tokens)
    states = torch.empty(targets, width, dtype=autocast or held, requires_grad=True)
    wanted, chosen = torch.empty(2, targets, dtype=torch.int64)
    live = LiveBytes()
    with live:
        live.ignore(nn.ParameterList([weight, states, *([] if rows is None else [rows.weight])]))
        # In training the states are picked out of all positions, and so copied.
        picked = states.index_select(0, chosen)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss, _ = linear_cross_entropy(picked, wanted, Head(weight, None, rows, LogitTransform.of(config)))
        del picked
        forward = live.peak
        live.restart()
        loss.backward()
    gradients = [weight.grad, None if rows is None else rows.weight.grad]
    kept = sum(gradient.numel() * gradient.element_size() for gradient in gradients if gradient is not None)
    return LossTrace(forward, live.peak, kept)
