"""Memory of one training step on shapes: what is alive at each moment of forward and backward.

Nothing is computed and nothing allocated: every operation runs on fake tensors, and the bytes of the storages alive
are counted. Weights do not count; what autocast, autograd and the kernels make of them does.
"""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftchat.models.added_tokens import AddedTokenHead
from peftchat.training.lm_head import Head, LogitTransform
from peftchat.training.loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
    """The mask that keeps packed dialogues apart, as transformers makes it for SDPA (bool) and eager (a float)."""
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
