"""Cross entropy on the supervised positions only, without the full logits.

The head is the widest matrix of the model and most positions of a dialogue carry no target, so hidden states are
gathered first and projected in chunks. The gradient is formed in the same pass, as in Liger's fused linear cross
entropy (Hsu et al., 2024): one chunk of logits exists at a time and nothing is computed twice. A frozen head gets
no gradient; the rows of new tokens get one of their own small size.
"""

from typing import Any

import torch
from torch import Tensor

from peftchat.training.head import Chunk, Head, spread, struck_out

# Elements of one chunk of logits. A GPU wants tall products; a CPU wants float32 logits that stay in its cache.
_CHUNK_ELEMENTS = {"cuda": 2**25, "cpu": 3 * 2**21}
# Adding up the gradient of a whole head costs a pass over it each chunk, so there are fewer.
_TALLER_FOR_WEIGHT = 4


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
    differentiable = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        total, correct = _SupervisedNLL.apply(
            hidden,
            targets,
            head.weight,
            head.bias,
            None if head.rows is None else head.rows.weight,
            head,
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
        head: Head,
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
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        step = rows_at_once(len(hidden), head.size, hidden.device.type, taller=wants["weight"])
        # One buffer for all chunks: new memory of this size is slow to come by.
        products = torch.empty(step, len(weight), dtype=dtype, device=hidden.device)
        struck = struck_out(head)
        for start in range(0, hidden.shape[0], step):
            states = hidden[start : start + step].to(dtype)
            product = torch.mm(states, cast_weight.T, out=products[: len(states)])
            chunk = Chunk.of(product, states, targets[start : start + step, None], cast_rows, head)
            if count_correct:
                correct += chunk.count_correct(struck)
            log_mass, slope = (head.spread if gradients else spread)(
                product, chunk.new, bias, struck, head.transform, bool(gradients)
            )
            total += (log_mass - chunk.of_targets).sum()
            if slope is None:
                continue
            of_rows = chunk.put_targets(slope, log_mass)
            if "rows" in gradients and of_rows is not None:
                gradients["rows"] += of_rows.T @ states
            if "bias" in gradients:
                gradients["bias"] += slope.sum(0, dtype=torch.float32)
            if "weight" in gradients:
                gradients["weight"] += slope.T @ states
            if "hidden" in gradients:
                of_states = slope @ cast_weight
                if of_rows is not None and cast_rows is not None:
                    of_states.addmm_(of_rows, cast_rows)
                gradients["hidden"][start : start + step] = of_states
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
        found: list[Tensor | None] = [None] * 9
        for place, name in ((0, "hidden"), (2, "weight"), (3, "bias"), (4, "rows")):
            if name in saved:
                gradient = saved[name] * scale.to(saved[name].dtype)
                found[place] = gradient.to(ctx.dtypes.get(name, gradient.dtype))
        return tuple(found)


def rows_at_once(positions: int, size: int, device: str, *, taller: bool) -> int:
    """How many positions are projected together."""
    rows = _CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"] // size
    return max(1, min(positions, max(16, rows * (_TALLER_FOR_WEIGHT if taller else 1))))
