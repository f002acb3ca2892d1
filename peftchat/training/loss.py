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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from peftchat.chat_template.loss_mask import IGNORE_INDEX
from peftchat.models.added_tokens import find_added_tokens
from peftchat.models.backbone import backbone_of
from peftchat.models.compiled import has_compiled_layers
from peftchat.training.linear_cross_entropy import Weigh, chunk_size, linear_cross_entropy, product_dtype
from peftchat.training.lm_head import Head, LogitTransform, logsumexp_and_grad
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


@dataclass(slots=True)
class LossSettings:
    """How the loss is computed; none of it changes its value beyond rounding.

    Attributes:
        compiled: whether the log-sum-exp is compiled on a GPU.
        chunk_factor: factor on the number of positions that are projected at a time.
    """

    compiled: bool = False
    chunk_factor: float = 1.0


@functools.cache
def _compiled_logsumexp() -> Callable[..., Tensor]:
    # Chunks differ in size; `dynamic` compiles one program for all of them.
    compiled: Callable[..., Tensor] = torch.compile(logsumexp_and_grad, dynamic=True)
    return compiled


def install_supervised_forward(model: PreTrainedModel) -> LossSettings:
    """Let `model(..., labels=labels, supervised=True)` return a `SupervisedOutput`.

    With `weigh=function`, its `loss` is a function of the single losses instead of their sum. With
    `reference=next_tokens`, it has the KL divergence from these. Without `supervised`, the forward is unchanged. If the
    model's layers are compiled, the loss is compiled too on a GPU.

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
        backbone = backbone_of(self)(*args, **kwargs, use_cache=False)
        # The hidden state at position t predicts the token at t + 1.
        targets = labels[:, 1:]
        supervised_positions = targets != IGNORE_INDEX
        layer = self.get_output_embeddings()
        added = find_added_tokens(self)
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):
            # On a CPU, tiles in its cache are faster: what is compiled has the float32 logits of a whole chunk.
            in_tiles = layer.weight.device.type == "cpu"
            logsumexp = _compiled_logsumexp() if settings.compiled and not in_tiles else logsumexp_and_grad
            added_head = None if added is None else added.head()
            head = Head(layer.weight, layer.bias, added_head, transform, logsumexp, settings.chunk_factor, in_tiles)
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
    """Return the KL divergence at each position, in chunks of half the size: two models have logits, in float32."""
    device, head = model.states.device.type, model.head
    itemsize = 2 * torch.float32.itemsize
    chunk = chunk_size(len(model.states), head.size, device, trains_head=False, itemsize=itemsize)
    dtype = product_dtype(model.states)
    with torch.autocast(device, enabled=False):
        return kl_from_reference(model, reference, dtype, max(1, chunk // 2))


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
