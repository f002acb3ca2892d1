"""Linear cross-entropy: the LM head and the loss of the supervised positions as one operation, chunk by chunk.

The gradients are computed with the loss, so that logits exist for one chunk at a time. Its products with the head's
weight are large. What is between them runs over few positions at a time on a CPU, whose float32 logits fit into the
cache, and leaves the gradient in the place of the logits.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftchat.training.lm_head import Chunk, Head, logsumexp_and_grad, mask_overridden_logits

Weigh = Callable[[Tensor], Tensor]
"""A differentiable function of the losses of all supervised positions, shape (N,), that returns a number, shape ()."""


# Elements of one chunk of logits on a GPU, and bytes of one on a CPU: large products are faster.
_GPU_CHUNK_ELEMENTS = 2**25
_CPU_CHUNK_BYTES = 3 * 2**24
# Accumulating the gradient of the head costs a pass over it per chunk, so the chunks are larger.
_LARGER_FOR_WEIGHT = {"cuda": 4, "cpu": 2}
# Elements of the float32 logits that are computed at a time on a CPU: they fit into its cache.
_TILE_ELEMENTS = 3 * 2**19


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
    dtype, differentiable = product_dtype(hidden), torch.is_grad_enabled()
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


@dataclass(frozen=True, slots=True)
class _ChunkLosses:
    """The losses of a chunk of n positions.

    Attributes:
        losses: float32, shape (n, 1).
        correct: number of targets that are the most likely token, int64, shape (); 0 where they are not counted.
        grad_added: gradient of the added tokens' logits, shape (n, added), in the dtype of the product, or None.
    """

    losses: Tensor
    correct: Tensor
    grad_added: Tensor | None


@dataclass(frozen=True, slots=True)
class _Tiles:
    """What is between the products of a chunk, for a tile of positions at a time.

    Attributes:
        head: the LM head.
        added_weight: output embeddings of added tokens in the dtype of the product, or None.
        logit_mask: minus infinity at the ids that added tokens override, 0 elsewhere, shape (V,); or None.
        logits: room for the float32 logits of a tile, shape (tile, V); None if a chunk is one tile.
        with_grad: whether the gradient replaces the product.
        count_correct: whether to count the targets that are the most likely token.
    """

    head: Head
    added_weight: Tensor | None
    logit_mask: Tensor | None
    logits: Tensor | None
    with_grad: bool
    count_correct: bool

    @classmethod
    def of(
        cls, head: Head, product: Tensor, added_weight: Tensor | None, *, with_grad: bool, count_correct: bool
    ) -> "_Tiles":
        """Prepare the tiles of chunks whose product has at most this size."""
        logits = None
        if head.in_tiles:
            rows = min(len(product), max(8, _TILE_ELEMENTS // product.shape[1]))
            logits = torch.empty(rows, product.shape[1], dtype=torch.float32, device=product.device)
        return cls(head, added_weight, mask_overridden_logits(head), logits, with_grad, count_correct)

    def run(self, product: Tensor, states: Tensor, targets: Tensor) -> _ChunkLosses:
        """Compute the losses, and replace the product by its gradient.

        Args:
            product: hidden states times the head's weight, shape (n, V).
            states: the hidden states in the dtype of the product, shape (n, H).
            targets: int64, shape (n, 1).
        """
        count = len(product)
        rows = max(1, count) if self.logits is None else len(self.logits)
        parts = [self._tile(*(tensor[first : first + rows] for tensor in (product, states, targets)))
                 for first in range(0, count, rows)]  # fmt: skip
        grads = [part.grad_added for part in parts if part.grad_added is not None]
        losses = torch.cat([part.losses for part in parts])
        return _ChunkLosses(
            losses, torch.stack([part.correct for part in parts]).sum(), torch.cat(grads) if grads else None
        )

    def _tile(self, product: Tensor, states: Tensor, targets: Tensor) -> _ChunkLosses:
        head = self.head
        chunk = Chunk.of(head, product, states, targets, self.added_weight)
        correct = targets.new_zeros(())
        if self.count_correct:
            correct = chunk.count_correct(self.logit_mask, self.logits)
        logsumexp = (head.logsumexp if self.with_grad else logsumexp_and_grad)(
            product, chunk.added_logits, head.bias, self.logit_mask, head.transform, self.with_grad, self.logits
        )
        losses = logsumexp - chunk.target_logits
        return _ChunkLosses(losses, correct, chunk.subtract_targets(product, logsumexp) if self.with_grad else None)


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
        step = chunk_size(
            len(hidden), head.size, hidden.device.type, trains_head="weight" in grads, itemsize=self.dtype.itemsize
        )
        step = max(1, min(len(hidden), int(step * head.chunk_factor)))
        # One buffer for all chunks: allocating this much memory is slow.
        buffer = torch.empty(step, len(self.weight), dtype=self.dtype, device=hidden.device)
        tiles = _Tiles.of(head, buffer, cast_added_weight, with_grad=bool(grads), count_correct=count_correct)
        for start in range(0, len(hidden), step):
            states = hidden[start : start + step].to(self.dtype)
            product = torch.mm(states, cast_weight.T, out=buffer[: len(states)])
            found = tiles.run(product, states, self.targets[start : start + step, None])
            total += found.losses.sum()
            correct += found.correct
            if losses is not None:
                losses[start : start + step] = found.losses.flatten()
            if not grads:
                continue
            grad_logits, grad_added = product, found.grad_added
            if scales is not None:
                factors = scales[start : start + step, None].to(self.dtype)
                grad_logits *= factors
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


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of the product with the LM head, outside of which autocast is switched off."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def chunk_size(positions: int, vocabulary: int, device: str, *, trains_head: bool, itemsize: int) -> int:
    """Return how many positions are projected at a time.

    Args:
        positions: of all chunks.
        vocabulary: number of logits.
        device: type of the device.
        trains_head: whether the head gets a gradient.
        itemsize: bytes of one product's element.
    """
    elements, kind = (_CPU_CHUNK_BYTES // itemsize, "cpu") if device == "cpu" else (_GPU_CHUNK_ELEMENTS, "cuda")
    rows = elements // vocabulary * (_LARGER_FOR_WEIGHT[kind] if trains_head else 1)
    return max(1, min(positions, max(16, rows)))
