"""Loss: cross-entropy over the supervised positions, chunk by chunk, inside the model's own forward.

It is part of `model.forward` so that DDP, DeepSpeed and PEFT call one ordinary forward. TRL installs a head of its own
in the same place (`trl.trainer.utils.add_fused_lm_head`). That head reads `lm_head.weight`, which lacks the embeddings
of added tokens, and outside CUDA it projects every position.
"""

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from peftchat.chat_template.loss_mask import IGNORE_INDEX
from peftchat.models.added_tokens import find_added_tokens
from peftchat.models.compiled import has_compiled_layers
from peftchat.training.lm_head import Chunk, Head, LogitTransform, logsumexp_and_grad, mask_overridden_logits
from peftchat.training.reference_kl import NextTokens, kl_from_reference


@dataclass
class SupervisedOutput(ModelOutput):
    """The output of the supervised forward.

    Attributes:
        loss: sum of the negative log-likelihoods in nats, float32, shape (); or what `weigh` makes of them.
        correct: supervised positions whose most likely token is the target, int64, shape (); counted only without
            gradients.
        losses: the negative log-likelihood of each supervised position in nats, in the order of the labels, float32,
            shape (N,); not differentiable.
        aux_loss: load-balancing loss of a mixture of experts, float32, shape (), or None.
        next_tokens: what the model says of the next tokens at these positions; only without gradients.
        kl: the KL divergence from a reference there, float32, shape (N,), where one was given.
    """

    loss: Tensor | None = None
    correct: Tensor | None = None
    losses: Tensor | None = None
    aux_loss: Tensor | None = None
    next_tokens: NextTokens | None = None
    kl: Tensor | None = None


Weigh = Callable[[Tensor], Tensor]
"""A differentiable function of the losses of all supervised positions, shape (N,), that returns a number, shape ()."""


@dataclass(slots=True)
class LossSettings:
    """How the loss is computed; none of it changes its value beyond rounding.

    Attributes:
        compiled: whether the log-sum-exp is compiled.
        chunk_factor: factor on the number of positions that are projected at a time.
    """

    compiled: bool = False
    chunk_factor: float = 1.0


@functools.cache
def _compiled_logsumexp() -> Callable[..., tuple[Tensor, Tensor | None]]:
    # Chunks differ in size; `dynamic` compiles one program for all of them.
    compiled: Callable[..., tuple[Tensor, Tensor | None]] = torch.compile(logsumexp_and_grad, dynamic=True)
    return compiled


def install_supervised_forward(model: PreTrainedModel) -> LossSettings:
    """Let `model(..., labels=labels, supervised=True)` return a `SupervisedOutput`.

    With `weigh=function`, its `loss` is a function of the single losses instead of their sum. With
    `reference=next_tokens`, it has the KL divergence from these. Without `supervised`, the forward is unchanged. If the
    model's layers are compiled, the loss is compiled too.

    Args:
        model: the causal language model itself, inside any PEFT wrapper.

    Returns:
        What later calls go by; it may be changed.
    """
    original = model.forward
    transform = LogitTransform.of(model.config)
    settings = LossSettings(compiled=has_compiled_layers(model))

    @functools.wraps(original)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        supervised: bool = False,
        weigh: Weigh | None = None,
        reference: NextTokens | None = None,
        **kwargs: Any,
    ) -> Any:
        if not supervised:
            return original(*args, **kwargs)
        labels: Tensor = kwargs.pop("labels")
        backbone = self.base_model(*args, **kwargs, use_cache=False)
        # The hidden state at position t predicts the token at t + 1.
        targets = labels[:, 1:]
        supervised_positions = targets != IGNORE_INDEX
        layer = self.get_output_embeddings()
        added = find_added_tokens(self)
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):
            logsumexp = _compiled_logsumexp() if settings.compiled else logsumexp_and_grad
            added_head = None if added is None else added.head()
            head = Head(layer.weight, layer.bias, added_head, transform, logsumexp, settings.chunk_factor)
            states = backbone.last_hidden_state[:, :-1][supervised_positions]
            evaluates = not torch.is_grad_enabled()
            losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
            loss, correct = linear_cross_entropy(
                states, targets[supervised_positions], head, count_correct=evaluates, losses=losses, weigh=weigh
            )
            next_tokens = NextTokens(states, head.detached()) if evaluates else None
            kl = None if next_tokens is None or reference is None else _kl(next_tokens, reference)
        return SupervisedOutput(
            loss=loss, correct=correct, losses=losses, aux_loss=_aux_loss(self, backbone, kwargs),
            next_tokens=next_tokens, kl=kl,
        )  # fmt: skip

    model.forward = types.MethodType(forward, model)
    return settings


def _kl(model: NextTokens, reference: NextTokens) -> Tensor:
    """Return the KL divergence at each position, in chunks of half the loss's size: two models have logits."""
    device, head = model.states.device.type, model.head
    chunk = chunk_size(len(model.states), head.size, device, trains_head=False)
    dtype = _product_dtype(model.states)
    with torch.autocast(device, enabled=False):
        return kl_from_reference(model, reference, dtype, max(1, chunk // 2))


def _product_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of the product with the LM head, outside of which autocast is switched off."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _aux_loss(model: PreTrainedModel, backbone: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the load-balancing loss of a mixture of experts (Fedus et al., 2021), if it returns router logits.

    It is computed as the architecture's own forward does. One without such a loss, such as Llama 4, has none here.
    """
    compute = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    logits = getattr(backbone, "router_logits", None)
    if not kwargs.get("output_router_logits") or compute is None or not logits:
        return None
    config = model.config.get_text_config()
    counts = {"num_experts": getattr(model, "num_experts", None) or config.num_experts}
    if "num_keys" in inspect.signature(compute).parameters:
        counts["num_keys"] = math.isqrt(counts["num_experts"])  # Doge finds experts by two keys.
    mask = kwargs.get("attention_mask")
    if mask is not None:
        # A prefix in the cache is in the mask, and passes no router.
        mask = mask[:, -(logits[0].shape[0] // mask.shape[0]) :]
    loss = compute(logits, **counts, top_k=config.num_experts_per_tok, attention_mask=mask)
    return loss if isinstance(loss, torch.Tensor) else None


# Elements of one chunk of logits: large products for a GPU, float32 logits that fit into the cache for a CPU.
_CHUNK_ELEMENTS = {"cuda": 2**25, "cpu": 3 * 2**21}
# Accumulating the gradient of the head costs a pass over it per chunk, so the chunks are larger.
_LARGER_FOR_WEIGHT = 4


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    count_correct: bool = False,
    losses: Tensor | None = None,
    weigh: Weigh | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the targets' negative log-likelihoods, and how many targets are the most likely token.

    Args:
        hidden: hidden states at the supervised positions, float, shape (N, H).
        targets: the tokens to predict there, int64, shape (N,).
        head: the LM head.
        count_correct: whether to count the targets that are the most likely token.
        losses: filled with the negative log-likelihood of each target, float32, shape (N,); not differentiable.
        weigh: what is returned instead of the sum. It is called here, so that the gradients need no weights of the head
            in the backward pass, where ZeRO-3 has partitioned them. A trained head costs one more product.

    Returns:
        The sum, float32, shape (), differentiable in `hidden`, the head's weight and bias and the added tokens'
        output embeddings; the count, int64, shape (), 0 without `count_correct`.
    """
    dtype, differentiable = _product_dtype(hidden), torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        total, correct = _LinearCrossEntropy.apply(
            hidden,
            targets,
            head.weight,
            head.bias,
            None if head.added_tokens is None else head.added_tokens.weight,
            head,
            dtype,
            differentiable,
            count_correct,
            losses,
            weigh,
        )
    return total, correct


_INPUTS = ("hidden", "weight", "bias", "added_weight")


@dataclass(slots=True)
class _HeadPass:
    """One pass over the supervised positions, chunk by chunk: losses, and the gradients that are asked for.

    Attributes:
        hidden: hidden states, shape (N, H).
        targets: int64, shape (N,).
        weight: of the head.
        bias: of the head, or None.
        added_weight: output embeddings of added tokens, or None.
        head: the LM head.
        dtype: of the product.
    """

    hidden: Tensor
    targets: Tensor
    weight: Tensor
    bias: Tensor | None
    added_weight: Tensor | None
    head: Head
    dtype: torch.dtype

    def run(
        self,
        needed: Collection[str],
        *,
        losses: Tensor | None = None,
        scales: Tensor | None = None,
        count_correct: bool = False,
        added_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum of the losses, the number of correct targets, and the gradients.

        Args:
            needed: names of `_INPUTS` whose gradients are computed.
            losses: filled with the loss of each target, shape (N,).
            scales: factor of each target's loss in the gradients, float32, shape (N,); 1 for all without it.
            count_correct: whether to count the targets that are the most likely token.
            added_rows: filled with the gradients of the added tokens' logits, shape (N, n).
        """
        head, hidden = self.head, self.hidden
        grads: dict[str, Tensor] = {}
        if "hidden" in needed:
            grads["hidden"] = torch.empty_like(hidden)
        # Sums over positions are accumulated in float32, whatever the dtype of the product.
        for name, tensor in (("weight", self.weight), ("bias", self.bias), ("added_weight", self.added_weight)):
            if name in needed and tensor is not None:
                grads[name] = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
        cast_weight = self.weight.to(self.dtype)
        cast_added_weight = None if self.added_weight is None else self.added_weight.to(self.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        step = chunk_size(len(hidden), head.size, hidden.device.type, trains_head="weight" in grads)
        step = max(1, min(len(hidden), int(step * head.chunk_factor)))
        # One buffer for all chunks: allocating this much memory is slow.
        buffer = torch.empty(step, len(self.weight), dtype=self.dtype, device=hidden.device)
        logit_mask = mask_overridden_logits(head)
        for start in range(0, hidden.shape[0], step):
            states = hidden[start : start + step].to(self.dtype)
            product = torch.mm(states, cast_weight.T, out=buffer[: len(states)])
            chunk = Chunk.of(head, product, states, self.targets[start : start + step, None], cast_added_weight)
            if count_correct:
                correct += chunk.count_correct(logit_mask)
            logsumexp, grad_logits = (head.logsumexp if grads else logsumexp_and_grad)(
                product, chunk.added_logits, self.bias, logit_mask, head.transform, bool(grads)
            )
            each = logsumexp - chunk.target_logits
            total += each.sum()
            if losses is not None:
                losses[start : start + step] = each.flatten()
            if grad_logits is None:
                continue
            grad_added = chunk.subtract_targets(grad_logits, logsumexp)
            if scales is not None:
                factors = scales[start : start + step, None].to(grad_logits.dtype)
                grad_logits = grad_logits * factors
                grad_added = None if grad_added is None else grad_added * factors
            if added_rows is not None and grad_added is not None:
                added_rows[start : start + step] = grad_added
            if "added_weight" in grads and grad_added is not None:
                grads["added_weight"] += grad_added.T @ states
            if "bias" in grads:
                grads["bias"] += grad_logits.sum(0, dtype=torch.float32)
            if "weight" in grads:
                grads["weight"] += grad_logits.T @ states
            if "hidden" in grads:
                grad_states = grad_logits @ cast_weight
                if grad_added is not None and cast_added_weight is not None:
                    grad_states.addmm_(grad_added, cast_added_weight)
                grads["hidden"][start : start + step] = grad_states
        return total, correct, grads

    def run_weighed(
        self, needed: Collection[str], weigh: Weigh, *, losses: Tensor | None = None, count_correct: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what `weigh` makes of the losses, the number of correct targets, and the gradients of the former.

        With a frozen head, the gradients of each position are scaled once its loss is weighed. Those of a trained head
        sum over positions, so the product is made once more.

        Args:
            needed: names of `_INPUTS` whose gradients are computed.
            weigh: see `Weigh`.
            losses: filled with the loss of each target, shape (N,).
            count_correct: whether to count the targets that are the most likely token.
        """
        each = torch.empty(len(self.hidden), dtype=torch.float32, device=self.hidden.device)
        is_frozen = "weight" not in needed and "bias" not in needed
        added_rows = None
        if needed and is_frozen and self.added_weight is not None:
            added_rows = self.hidden.new_zeros(len(self.hidden), len(self.added_weight), dtype=self.dtype)
        now = ["hidden"] if needed and is_frozen else []
        _, correct, grads = self.run(now, losses=each, count_correct=count_correct, added_rows=added_rows)
        if losses is not None:
            losses.copy_(each)
        with torch.enable_grad():
            leaf = each.requires_grad_()
            value = weigh(leaf)
        if not needed:
            return value.detach(), correct, {}
        (scales,) = torch.autograd.grad(value, leaf)
        if not is_frozen:
            _, _, grads = self.run(needed, scales=scales)
            return value.detach(), correct, grads
        grads["hidden"] *= scales[:, None].to(grads["hidden"].dtype)
        if "added_weight" in needed and added_rows is not None:
            scaled = added_rows * scales[:, None].to(added_rows.dtype)
            grads["added_weight"] = scaled.T.float() @ self.hidden.float()
        return value.detach(), correct, {name: grads[name] for name in needed}


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        added_weight: Tensor | None,
        head: Head,
        dtype: torch.dtype,
        differentiable: bool,
        count_correct: bool,
        losses: Tensor | None,
        weigh: Weigh | None,
    ) -> tuple[Tensor, Tensor]:
        needed = _needed(ctx) if differentiable else []
        head_pass = _HeadPass(hidden, targets, weight, bias, added_weight, head, dtype)
        if weigh is None:
            total, correct, grads = head_pass.run(needed, losses=losses, count_correct=count_correct)
        else:
            total, correct, grads = head_pass.run_weighed(needed, weigh, losses=losses, count_correct=count_correct)
        ctx.mark_non_differentiable(correct)
        ctx.names = list(grads)
        inputs = dict(zip(_INPUTS, (hidden, weight, bias, added_weight), strict=True))
        ctx.dtypes = {name: tensor.dtype for name, tensor in inputs.items() if tensor is not None}
        ctx.save_for_backward(*grads.values())
        return total, correct

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        grads: list[Tensor | None] = [None] * 11
        for name, grad in saved.items():
            grads[_PLACES[name]] = (grad * scale.to(grad.dtype)).to(ctx.dtypes[name])
        return tuple(grads)


_PLACES = {"hidden": 0, "weight": 2, "bias": 3, "added_weight": 4}
"""Where the inputs of `_INPUTS` stand among the arguments."""


def _needed(ctx: Any) -> list[str]:
    return [name for name, place in _PLACES.items() if ctx.needs_input_grad[place]]


def chunk_size(positions: int, vocabulary: int, device: str, *, trains_head: bool) -> int:
    """Return how many positions are projected at a time."""
    rows = _CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"] // vocabulary
    return max(1, min(positions, max(16, rows * (_LARGER_FOR_WEIGHT if trains_head else 1))))
