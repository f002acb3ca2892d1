"""The output layer as the loss sees it: logits, what new tokens add to them, and the slopes of a chunk of positions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from peftchat.models.added_tokens import AddedTokenHead


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its logits after the head: `softcap * tanh(scale * logits / softcap)`.

    Attributes:
        scale: factor on the logits.
        softcap: bound of the logits (Gemma 2), None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LogitTransform":
        """The transform that the model's config names; its spelling differs by family."""
        text = config.get_text_config()
        scale = 1.0
        # Cohere and MPT, Falcon-H1, and Granite, which divides.
        for name, inverse in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
            value = getattr(text, name, None)
            if isinstance(value, int | float):
                scale = 1.0 / value if inverse else float(value)
        return cls(scale, getattr(text, "final_logit_softcapping", None))

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform logits in place; what `backward_` needs to know of them, if anything."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is None:
            return None
        bent = logits.div_(self.softcap).tanh_().clone()
        logits *= self.softcap
        return bent

    def backward_(self, gradient: Tensor, bent: Tensor | None) -> None:
        """Turn the gradient of the transformed logits into that of the head's own, in place."""
        if bent is not None:
            gradient *= 1.0 - bent**2
        if self.scale != 1.0:
            gradient *= self.scale


def _own_logits(
    product: Tensor, bias: Tensor | None, struck: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor | None]:
    """Return float32 logits, shape (N, V), and what `LogitTransform.backward_` needs of them."""
    logits = product.to(torch.float32, copy=True)
    if bias is not None:
        logits += bias
    bent = transform.apply_(logits)
    if struck is not None:
        logits += struck
    return logits, bent


def logsumexp_and_grad(
    product: Tensor,
    new: Tensor | None,
    bias: Tensor | None,
    struck: Tensor | None,
    transform: LogitTransform,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """How the likelihood of each position spreads over the vocabulary.

    Args:
        product: states times the head, shape (N, V).
        new: float32 logits of new tokens, shape (N, n), or None.
        bias: the head's, shape (V,), or None.
        struck: what is added to the logits, minus infinity where a new token takes a place, shape (V,); or None.
        transform: what follows the projection.

    Returns:
        The log of the sum of all exponentials, float32, shape (N, 1); and, if it is wanted, the gradient of that log
        with respect to the product, shape (N, V), in its dtype.
    """
    logits, bent = _own_logits(product, bias, struck, transform)
    top = logits.amax(-1, keepdim=True)
    if new is not None:
        top = torch.maximum(top, new.amax(-1, keepdim=True))
    logits.sub_(top).exp_()
    mass = logits.sum(-1, keepdim=True)
    if new is not None:
        mass += (new - top).exp().sum(-1, keepdim=True)
    log_mass = top + mass.log()
    if not with_slope:
        return log_mass, None
    slope = logits.div_(mass)
    transform.backward_(slope, bent)
    return log_mass, slope.to(product.dtype)


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer with the rows of new tokens.

    Attributes:
        weight: float, shape (V, H).
        bias: float, shape (V,), or None.
        rows: rows of new tokens, or None.
        transform: what follows the projection.
        spread: `logsumexp_and_grad`, or the same function compiled.
    """

    weight: Tensor
    bias: Tensor | None
    rows: AddedTokenHead | None
    transform: LogitTransform
    spread: Callable[..., tuple[Tensor, Tensor | None]] = logsumexp_and_grad

    @property
    def size(self) -> int:
        """Number of logits."""
        return self.weight.shape[0] if self.rows is None else self.rows.size


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some positions on their way through the head.

    Attributes:
        product: states times the head, shape (N, V).
        wanted: the targets, int64, shape (N, 1).
        own: where a target's logit lies in the product, int64, shape (N, 1); anywhere for a new token.
        own_logits: the product there, as logits, float32, shape (N, 1).
        own_bent: what `LogitTransform.backward_` needs of them.
        matches: whether the target is this new token, bool, shape (N, n); None without new tokens.
        new: logits of the new tokens, float32, shape (N, n), or None.
        new_bent: what `LogitTransform.backward_` needs of those.
        head: the output layer.
    """

    product: Tensor
    wanted: Tensor
    own: Tensor
    own_logits: Tensor
    own_bent: Tensor | None
    matches: Tensor | None
    new: Tensor | None
    new_bent: Tensor | None
    head: Head

    @classmethod
    def of(cls, product: Tensor, states: Tensor, wanted: Tensor, cast_rows: Tensor | None, head: Head) -> "Chunk":
        """Look up the targets' logits."""
        own = wanted.clamp(max=product.shape[1] - 1)
        own_logits = product.gather(1, own).float()
        if head.bias is not None:
            own_logits += head.bias[own]
        own_bent = head.transform.apply_(own_logits)
        if cast_rows is None or head.rows is None:
            return cls(product, wanted, own, own_logits, own_bent, None, None, None, head)
        new = (states @ cast_rows.T).float()
        if head.rows.bias is not None:
            new += head.rows.bias
        new_bent = head.transform.apply_(new)
        return cls(product, wanted, own, own_logits, own_bent, wanted == head.rows.ids, new, new_bent, head)

    @property
    def of_targets(self) -> Tensor:
        """The targets' logits, float32, shape (N, 1)."""
        if self.matches is None or self.new is None:
            return self.own_logits
        found = torch.where(self.matches, self.new, 0.0).sum(-1, keepdim=True)
        return torch.where(self.matches.any(-1, keepdim=True), found, self.own_logits)

    def put_targets(self, slope: Tensor, log_mass: Tensor) -> Tensor | None:
        """Take the targets into account, in the slopes of the product and those of the new tokens.

        Args:
            slope: as `logsumexp_and_grad` finds it, changed in place.
            log_mass: as `logsumexp_and_grad` finds it.

        Returns:
            The slopes of the new tokens' logits, in the dtype of the product, shape (N, n); None without new tokens.
        """
        of_own = (self.own_logits - log_mass).exp_().sub_(1.0)
        self.head.transform.backward_(of_own, self.own_bent)
        # Not `scatter_`, which copies the whole of a bfloat16 tensor.
        places = torch.arange(len(slope), device=slope.device)[:, None], self.own
        of_own = of_own.to(slope.dtype)
        if self.matches is None or self.new is None:
            slope[places] = of_own
            return None
        slope[places] = torch.where(self.matches.any(-1, keepdim=True), slope[places], of_own)
        of_new = (self.new - log_mass).exp_().sub_(self.matches.float())
        self.head.transform.backward_(of_new, self.new_bent)
        return of_new.to(slope.dtype)

    def count_correct(self, struck: Tensor | None) -> Tensor:
        """How many targets are the most likely token (of equal ones, the first)."""
        logits, _ = _own_logits(self.product, self.head.bias, struck, self.head.transform)
        best, likeliest = logits.max(-1, keepdim=True)
        if self.new is not None and self.head.rows is not None:
            best_new, place = self.new.max(-1, keepdim=True)
            candidate = self.head.rows.ids[place]
            ahead = (best_new > best) | ((best_new == best) & (candidate < likeliest))
            likeliest = torch.where(ahead, candidate, likeliest)
        return (likeliest == self.wanted).sum()


def mask_overridden_logits(head: Head) -> Tensor | None:
    """What keeps the head's own rows of new tokens out: float32, shape (V,), or None if it has none."""
    if head.rows is None or not head.rows.overlaid:
        return None
    struck = torch.zeros(head.size, device=head.weight.device)
    struck[head.rows.ids] = float("-inf")
    return struck[: len(head.weight)]
