"""LM head for the chunked loss: logits, added tokens' logits, and their gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from peftchat.models.added_tokens import AddedTokenHead


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """A model's transform of the logits after its head: `softcap * tanh(scale * logits / softcap)`.

    Attributes:
        scale: factor on the logits.
        softcap: bound of the logits (Gemma 2), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LogitTransform":
        """Return the transform of a model's config; its keys differ by model type."""
        text = config.get_text_config()
        scale = 1.0
        # Cohere and MPT, Falcon-H1, and Granite, which divides.
        for name, inverse in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
            value = getattr(text, name, None)
            if isinstance(value, int | float):
                scale = 1.0 / value if inverse else float(value)
        return cls(scale, getattr(text, "final_logit_softcapping", None))

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform logits in place; return the tanh that `backward_` needs, if there is a softcap."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is None:
            return None
        tanh_logits = logits.div_(self.softcap).tanh_().clone()
        logits *= self.softcap
        return tanh_logits

    def backward_(self, grad: Tensor, tanh_logits: Tensor | None) -> None:
        """Turn the gradient of the transformed logits into that of the head's output, in place."""
        if tanh_logits is not None:
            grad *= 1.0 - tanh_logits**2
        if self.scale != 1.0:
            grad *= self.scale


def _transformed_logits(
    product: Tensor, bias: Tensor | None, logit_mask: Tensor | None, transform: LogitTransform,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return float32 logits, shape (N, V), and the tanh that `LogitTransform.backward_` needs."""
    logits = product.to(torch.float32, copy=True) if room is None else room[: len(product)].copy_(product)
    if bias is not None:
        logits += bias
    tanh_logits = transform.apply_(logits)
    if logit_mask is not None:
        logits += logit_mask
    return logits, tanh_logits


def logsumexp_and_grad(
    product: Tensor,
    added_logits: Tensor | None,
    bias: Tensor | None,
    logit_mask: Tensor | None,
    transform: LogitTransform,
    with_grad: bool,
    room: Tensor | None = None,
) -> Tensor:
    """Return the log-sum-exp of the logits, float32, shape (N, 1).

    Args:
        product: hidden states times the head's weight, shape (N, V).
        added_logits: float32 logits of the added tokens, shape (N, n), or None.
        bias: the head's bias, shape (V,), or None.
        logit_mask: minus infinity at the ids that added tokens override, 0 elsewhere, shape (V,); or None.
        transform: the transform after the head.
        with_grad: whether the product is replaced by the gradient with respect to it.
        room: float32, shape (at least N, V): the logits are computed there. Without it, memory is allocated.
    """
    logits, tanh_logits = _transformed_logits(product, bias, logit_mask, transform, room)
    largest = logits.amax(-1, keepdim=True)
    if added_logits is not None:
        largest = torch.maximum(largest, added_logits.amax(-1, keepdim=True))
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    if added_logits is not None:
        total += (added_logits - largest).exp().sum(-1, keepdim=True)
    logsumexp = largest + total.log()
    if with_grad:
        grad_logits = logits.div_(total)
        transform.backward_(grad_logits, tanh_logits)
        product.copy_(grad_logits)
    return logsumexp


@dataclass(frozen=True, slots=True)
class Head:
    """An LM head with the output embeddings of added tokens.

    Attributes:
        weight: float, shape (V, H).
        bias: float, shape (V,), or None.
        added_tokens: the output embeddings of added tokens, or None.
        transform: the transform after the head.
        logsumexp: `logsumexp_and_grad`, or the same function compiled.
        chunk_factor: factor on the number of positions that are projected at a time.
        in_tiles: whether float32 logits exist for a part of a chunk at a time.
    """

    weight: Tensor
    bias: Tensor | None
    added_tokens: AddedTokenHead | None
    transform: LogitTransform
    logsumexp: Callable[..., Tensor] = logsumexp_and_grad
    chunk_factor: float = 1.0
    in_tiles: bool = False

    @property
    def size(self) -> int:
        """Number of logits."""
        return self.weight.shape[0] if self.added_tokens is None else self.added_tokens.size

    def detached(self) -> "Head":
        """Return the head as it is now, without gradients: it stays where its parameters get other values."""
        added, bias = self.added_tokens, self.bias
        added = None if added is None else replace(added, weight=added.weight.detach())
        bias = None if bias is None else bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias, added_tokens=added)

    def log_probs(self, states: Tensor) -> Tensor:
        """Return the log-probability of every token, without gradients.

        Args:
            states: hidden states in the dtype of the product, shape (N, H).

        Returns:
            float32, shape (N, V + n): the head's tokens, then the added ones; minus infinity where one of these
            overrides one of the head's.
        """
        product = states @ self.weight.to(states.dtype).T
        logits, _ = _transformed_logits(product, self.bias, mask_overridden_logits(self), self.transform)
        if self.added_tokens is not None:
            added, _ = self.added_logits(states, self.added_tokens.weight.to(states.dtype))
            logits = torch.cat([logits, added], dim=-1)
        return logits.log_softmax(-1)

    def added_logits(self, states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the added tokens, float32, shape (N, n), and the tanh that `backward_` needs.

        Args:
            states: hidden states, shape (N, H).
            weight: the added tokens' output embeddings in the dtype of the states, shape (n, H).
        """
        logits = (states @ weight.T).float()
        if self.added_tokens is not None and self.added_tokens.bias is not None:
            logits += self.added_tokens.bias
        return logits, self.transform.apply_(logits)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The logits of some supervised positions at their targets.

    Attributes:
        head: the LM head.
        product: hidden states times the head's weight, shape (N, V).
        target_ids: the targets, int64, shape (N, 1).
        target_index: the column of each target in the product, int64, shape (N, 1); any column for an added token.
        base_logits: the product there, as logits, float32, shape (N, 1).
        base_tanh: the tanh that `LogitTransform.backward_` needs for them.
        is_added_token: whether the target is this added token, bool, shape (N, n); None without added tokens.
        added_logits: logits of the added tokens, float32, shape (N, n), or None.
        added_tanh: the tanh that `LogitTransform.backward_` needs for them.
    """

    head: Head
    product: Tensor
    target_ids: Tensor
    target_index: Tensor
    base_logits: Tensor
    base_tanh: Tensor | None
    is_added_token: Tensor | None = None
    added_logits: Tensor | None = None
    added_tanh: Tensor | None = None

    @classmethod
    def of(
        cls, head: Head, product: Tensor, states: Tensor, target_ids: Tensor, added_weight: Tensor | None
    ) -> "Chunk":
        """Look up the targets' logits.

        Args:
            head: the LM head.
            product: hidden states times the head's weight, shape (N, V).
            states: the hidden states, shape (N, H).
            target_ids: the targets, int64, shape (N, 1).
            added_weight: the added tokens' output embeddings in the dtype of the states, shape (n, H), or None.
        """
        target_index = target_ids.clamp(max=product.shape[1] - 1)
        base_logits = product.gather(1, target_index).float()
        if head.bias is not None:
            base_logits += head.bias[target_index]
        base_tanh = head.transform.apply_(base_logits)
        if added_weight is None or head.added_tokens is None:
            return cls(head, product, target_ids, target_index, base_logits, base_tanh)
        added_logits, added_tanh = head.added_logits(states, added_weight)
        is_added_token = target_ids == head.added_tokens.ids
        return cls(
            head, product, target_ids, target_index, base_logits, base_tanh, is_added_token, added_logits, added_tanh
        )

    @property
    def target_logits(self) -> Tensor:
        """The targets' logits, float32, shape (N, 1)."""
        if self.is_added_token is None or self.added_logits is None:
            return self.base_logits
        added = torch.where(self.is_added_token, self.added_logits, 0.0).sum(-1, keepdim=True)
        return torch.where(self.is_added_token.any(-1, keepdim=True), added, self.base_logits)

    def subtract_targets(self, grad_logits: Tensor, logsumexp: Tensor) -> Tensor | None:
        """Turn the gradient of the log-sum-exp into that of the loss, in place.

        Args:
            grad_logits: the gradient that `logsumexp_and_grad` leaves, changed in place.
            logsumexp: what it returns.

        Returns:
            The gradient of the added tokens' logits, in the dtype of the product, shape (N, n); None without them.
        """
        grad_base = (self.base_logits - logsumexp).exp_().sub_(1.0)
        self.head.transform.backward_(grad_base, self.base_tanh)
        # `scatter_` would copy a bfloat16 tensor in full.
        index = torch.arange(len(grad_logits), device=grad_logits.device)[:, None], self.target_index
        grad_base = grad_base.to(grad_logits.dtype)
        if self.is_added_token is None or self.added_logits is None:
            grad_logits[index] = grad_base
            return None
        grad_logits[index] = torch.where(self.is_added_token.any(-1, keepdim=True), grad_logits[index], grad_base)
        grad_added = (self.added_logits - logsumexp).exp_().sub_(self.is_added_token.float())
        self.head.transform.backward_(grad_added, self.added_tanh)
        return grad_added.to(grad_logits.dtype)

    def count_correct(self, logit_mask: Tensor | None, room: Tensor | None = None) -> Tensor:
        """Count the targets that are the most likely token; of equally likely tokens the first one counts.

        The arguments are those of `logsumexp_and_grad`.
        """
        logits, _ = _transformed_logits(self.product, self.head.bias, logit_mask, self.head.transform, room)
        best, predicted = logits.max(-1, keepdim=True)
        if self.added_logits is not None and self.head.added_tokens is not None:
            best_added, index = self.added_logits.max(-1, keepdim=True)
            candidate = self.head.added_tokens.ids[index]
            ahead = (best_added > best) | ((best_added == best) & (candidate < predicted))
            predicted = torch.where(ahead, candidate, predicted)
        return (predicted == self.target_ids).sum()


def mask_overridden_logits(head: Head) -> Tensor | None:
    """Return the mask of the head's logits that added tokens override: float32, shape (V,), or None."""
    if head.added_tokens is None or not head.added_tokens.overlaid:
        return None
    logit_mask = torch.zeros(head.size, device=head.weight.device)
    logit_mask[head.added_tokens.ids] = float("-inf")
    return logit_mask[: len(head.weight)]
