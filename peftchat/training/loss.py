"""Cross entropy on the supervised positions only, without the full logits.

The head is the widest matrix of the model and most positions of a dialogue carry no target, so hidden states are
gathered first and projected in chunks. The gradient is formed in the same pass, as in Liger's fused linear cross
entropy (Hsu et al., 2024): one chunk of logits exists at a time and nothing is computed twice. A frozen head gets
no gradient; the rows of new tokens get one of their own small size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from peftchat.models.rows import HeadRows

# Elements of one chunk of logits. A GPU wants tall products; a CPU wants float32 logits that stay in its cache.
_CHUNK_ELEMENTS = {"cuda": 2**25, "cpu": 3 * 2**21}
# Adding up the gradient of a whole head costs a pass over it each chunk, so there are fewer.
_TALLER_FOR_WEIGHT = 4


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What a model does to its logits after the head: `softcap * tanh(scale * logits / softcap)`.

    Attributes:
        scale: factor on the logits.
        softcap: bound of the logits (Gemma 2), None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "HeadTransform":
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


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer with the rows of new tokens.

    Attributes:
        weight: float, shape (V, H).
        bias: float, shape (V,), or None.
        rows: rows of new tokens, or None.
        transform: what follows the projection.
    """

    weight: Tensor
    bias: Tensor | None
    rows: HeadRows | None
    transform: HeadTransform

    @property
    def size(self) -> int:
        """Number of logits."""
        return self.weight.shape[0] if self.rows is None else self.rows.size


def supervised_nll(
    hidden: Tensor, targets: Tensor, head: Head, *, count_correct: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of the targets, and how many of them are the most likely token.

    Args:
        hidden: states at the supervised positions, float, shape (N, H).
        targets: the tokens to predict there, int64, shape (N,).
        head: the output layer.
        count_correct: whether to look for the most likely tokens; training has no use for them.

    Returns:
        The sum, float32, shape (), differentiable in `hidden`, the head's weight and bias and the new rows; the
        count, int64, shape (), 0 if it was not asked for.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = head.rows
    differentiable = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        total, correct = _SupervisedNLL.apply(
            hidden,
            targets,
            head.weight,
            head.bias,
            None if rows is None else rows.weight,
            None if rows is None else rows.bias,
            None if rows is None else rows.ids,
            head.size,
            head.transform,
            dtype,
            differentiable,
            count_correct,
        )
    return total, correct


class _SupervisedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        rows_bias: Tensor | None,
        row_ids: Tensor | None,
        size: int,
        transform: HeadTransform,
        dtype: torch.dtype,
        differentiable: bool,
        count_correct: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad
        wants = {
            "hidden": differentiable and needs[0],
            "weight": differentiable and needs[2],
            "bias": differentiable and bias is not None and needs[3],
            "rows": differentiable and rows is not None and needs[4],
        }
        # Sums over positions are kept in float32, whatever the dtype of the product.
        gradients: dict[str, Tensor] = {}
        if wants["hidden"]:
            gradients["hidden"] = torch.empty_like(hidden)
        for name, tensor in (("weight", weight), ("bias", bias), ("rows", rows)):
            if wants[name] and tensor is not None:
                gradients[name] = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
        cast_weight = weight.to(dtype)
        cast_rows = None if rows is None else rows.to(dtype)
        vocabulary = weight.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        step = rows_at_once(len(hidden), size, hidden.device.type, taller=wants["weight"])
        # One set of buffers for all chunks: new memory of this size is slow to come by.
        buffer = torch.empty(step, size, dtype=torch.float32, device=hidden.device)
        products = torch.empty(step, vocabulary, dtype=dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], step):
            states = hidden[start : start + step].to(dtype)
            wanted = targets[start : start + step, None]
            logits, product = buffer[: len(states)], products[: len(states)]
            torch.mm(states, cast_weight.T, out=product)
            _fill_logits(logits, product, states, bias, cast_rows, rows_bias, row_ids)
            bent = transform.apply_(logits)
            if count_correct:
                correct += (logits.argmax(-1, keepdim=True) == wanted).sum()
            logits -= logits.amax(-1, keepdim=True)
            of_targets = logits.gather(1, wanted)
            logits.exp_()
            mass = logits.sum(-1, keepdim=True)
            total += (mass.log() - of_targets).sum()
            if not gradients:
                continue
            slope = logits.div_(mass)
            slope.scatter_add_(1, wanted, torch.full_like(mass, -1.0))
            transform.backward_(slope, bent)
            back: Tensor | None = None
            if row_ids is not None and cast_rows is not None:
                of_rows = slope[:, row_ids].to(dtype)
                slope.index_fill_(1, row_ids, 0.0)
                back = of_rows @ cast_rows
                if "rows" in gradients:
                    gradients["rows"] += of_rows.T @ states
            own = slope[:, :vocabulary]
            if "bias" in gradients:
                gradients["bias"] += own.sum(0)
            product.copy_(own)
            if "weight" in gradients:
                gradients["weight"] += product.T @ states
            if "hidden" in gradients:
                of_states = product @ cast_weight
                gradients["hidden"][start : start + step] = of_states if back is None else of_states.add_(back)
        ctx.mark_non_differentiable(correct)
        ctx.names = list(gradients)
        ctx.dtypes = {"weight": weight.dtype, "bias": bias.dtype if bias is not None else None, "rows": torch.float32}
        ctx.save_for_backward(*gradients.values())
        if rows is not None:
            ctx.dtypes["rows"] = rows.dtype
        return total, correct

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        found: list[Tensor | None] = [None] * 12
        for place, name in ((0, "hidden"), (2, "weight"), (3, "bias"), (4, "rows")):
            if name in saved:
                gradient = saved[name] * scale.to(saved[name].dtype)
                found[place] = gradient.to(ctx.dtypes.get(name, gradient.dtype))
        return tuple(found)


def rows_at_once(positions: int, size: int, device: str, *, taller: bool) -> int:
    """How many positions are projected together."""
    rows = _CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"] // size
    return max(1, min(positions, max(16, rows * (_TALLER_FOR_WEIGHT if taller else 1))))


def _fill_logits(
    logits: Tensor,
    product: Tensor,
    states: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    rows_bias: Tensor | None,
    row_ids: Tensor | None,
) -> None:
    """Write the logits over the grown vocabulary: float32, shape (N, size).

    Args:
        product: states times the head, shape (N, V).
    """
    vocabulary = product.shape[1]
    own = logits[:, :vocabulary]
    own.copy_(product)
    if bias is not None:
        own += bias
    if rows is None or row_ids is None:
        return
    # A gap between the model's vocabulary and the new tokens is never likely.
    logits[:, vocabulary:].fill_(torch.finfo(torch.float32).min)
    new = (states @ rows.T).float()
    if rows_bias is not None:
        new += rows_bias
    logits.index_copy_(1, row_ids, new)
