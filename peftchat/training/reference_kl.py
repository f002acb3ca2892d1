"""KL divergence of a model from its reference: exact at each position, over all tokens that could come next.

Both models give hidden states; logits exist for one chunk of positions at a time, as in the loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from peftchat.training.lm_head import Head

_LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class NextTokens:
    """What a model says of the next token at some positions.

    Attributes:
        states: hidden states, float, shape (N, H).
        head: the LM head that they go through, detached.
    """

    states: Tensor
    head: Head


def kl_from_reference(model: NextTokens, reference: NextTokens, dtype: torch.dtype, chunk: int) -> Tensor:
    """Return KL(model ‖ reference) in nats at each position, float32, shape (N,).

    Args:
        model: the model that is trained.
        reference: the reference at the same positions, with logits of the same tokens.
        dtype: of the products with the heads.
        chunk: positions whose logits exist at a time.
    """
    divergences = torch.empty(len(model.states), dtype=torch.float32, device=model.states.device)
    for start in range(0, len(model.states), chunk):
        part = slice(start, start + chunk)
        # A finite bound, so that a token that neither of them predicts adds 0: infinities have no difference.
        own, other = (one.head.log_probs(one.states[part].to(dtype)).clamp_(min=_LEAST) for one in (model, reference))
        divergences[part] = (own.exp() * (own - other)).sum(-1)
    return divergences
