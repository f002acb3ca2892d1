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
from peftchat.models.compiled import has_compiled_layers
from peftchat.models.rows import rows_of
from peftchat.training.head import Head, HeadTransform, spread
from peftchat.training.loss import supervised_nll


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
    transform = HeadTransform.of(model.config)
    # Chunks have sizes of their own; one program serves them all.
    compiled = torch.compile(spread, dynamic=True) if has_compiled_layers(model) else spread

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
        rows = rows_of(self)
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):
            head = Head(layer.weight, layer.bias, None if rows is None else rows.head(), transform, compiled)
            states = backbone.last_hidden_state[:, :-1][chosen]
            loss, correct = supervised_nll(states, targets[chosen], head, count_correct=not torch.is_grad_enabled())
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
