"""The forward that training uses: backbone, supervised positions, loss; all inside the model's own call.

It has to live inside `model.forward` so that DDP, DeepSpeed and PEFT see one ordinary forward. TRL installs a head
of its own in the same place (`trl.trainer.utils.add_fused_lm_head`); it reads `lm_head.weight`, which misses the
rows of new tokens, and outside CUDA it projects every position.
"""

import functools
import types
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


@dataclass
class SupervisedOutput(ModelOutput):
    """What the supervised forward returns.

    Attributes:
        loss: sum of the negative log-likelihoods in nats, float32, shape ().
        correct: supervised positions whose most likely token is the target, int64, shape (); counted where no
            gradient is wanted.
        aux_loss: load-balancing loss of mixtures of experts, float32, shape (), or None.
    """

    loss: Tensor | None = None
    correct: Tensor | None = None
    aux_loss: Tensor | None = None


def install_supervised_forward(model: PreTrainedModel) -> None:
    """Let `model(..., labels=labels, supervised=True)` return a `SupervisedOutput`.

    Without `supervised`, the forward is what it was. The model is the causal language model itself, inside any PEFT
    wrapper. Where its layers are compiled, what the loss does with logits is too.
    """
    original = model.forward
    transform = LogitTransform.of(model.config)
    # Chunks have sizes of their own; one program serves them all.
    compiled = torch.compile(logsumexp_and_grad, dynamic=True) if has_compiled_layers(model) else logsumexp_and_grad

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, supervised: bool = False, **kwargs: Any) -> Any:
        if not supervised:
            return original(*args, **kwargs)
        labels: Tensor = kwargs.pop("labels")
        backbone = self.base_model(*args, **kwargs, use_cache=False)
        # The state at position t predicts the token at t + 1.
        targets = labels[:, 1:]
        chosen = targets != IGNORE_INDEX
        layer = self.get_output_embeddings()
        rows = find_added_tokens(self)
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):
            head = Head(layer.weight, layer.bias, None if rows is None else rows.head(), transform, compiled)
            states = backbone.last_hidden_state[:, :-1][chosen]
            loss, correct = linear_cross_entropy(
                states, targets[chosen], head, count_correct=not torch.is_grad_enabled()
            )
        return SupervisedOutput(loss=loss, correct=correct, aux_loss=_aux_loss(self, backbone, kwargs))

    model.forward = types.MethodType(forward, model)


def _aux_loss(model: PreTrainedModel, backbone: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts that returns its router logits (Fedus et al., 2021)."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss = load_balancing_loss_func(
        backbone.router_logits, model.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
    return loss if isinstance(loss, torch.Tensor) else None


# Elements of one chunk of logits. A GPU wants tall products; a CPU wants float32 logits that stay in its cache.
_CHUNK_ELEMENTS = {"cuda": 2**25, "cpu": 3 * 2**21}
# Adding up the gradient of a whole head costs a pass over it each chunk, so there are fewer.
_TALLER_FOR_WEIGHT = 4


def linear_cross_entropy(
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
        total, correct = _LinearCrossEntropy.apply(
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


class _LinearCrossEntropy(torch.autograd.Function):
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
        step = chunk_size(len(hidden), head.size, hidden.device.type, taller=wants["weight"])
        # One buffer for all chunks: new memory of this size is slow to come by.
        products = torch.empty(step, len(weight), dtype=dtype, device=hidden.device)
        struck = mask_overridden_logits(head)
        for start in range(0, hidden.shape[0], step):
            states = hidden[start : start + step].to(dtype)
            product = torch.mm(states, cast_weight.T, out=products[: len(states)])
            chunk = Chunk.of(product, states, targets[start : start + step, None], cast_rows, head)
            if count_correct:
                correct += chunk.count_correct(struck)
            log_mass, slope = (head.spread if gradients else logsumexp_and_grad)(
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


def chunk_size(positions: int, size: int, device: str, *, taller: bool) -> int:
    """How many positions are projected together."""
    rows = _CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"] // size
    return max(1, min(positions, max(16, rows * (_TALLER_FOR_WEIGHT if taller else 1))))
