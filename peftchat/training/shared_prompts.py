"""Shared prompts: the answers of a pair behind one prompt in a line, where attention computes it as behind two."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftchat.chat_template.loss_mask import IGNORE_INDEX
from peftchat.dataset.collator import cu_seqlens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LENGTH = 12
"""Tokens of the prompt and of each answer in the check."""

TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 4e-3}
"""By how much the loss of a few tokens may differ, relative to it: sums are rounded in another order."""

_KINDS = {"full_attention", "sliding_attention"}


def can_share_prompts(config: "PretrainedConfig", longest: int) -> bool:
    """Return whether a model's layers are all of a kind that can continue a prompt twice.

    Args:
        config: the model's.
        longest: tokens of the longest conversation. Windows of at least that many have no effect.
    """
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    is_full = all(window is None or window >= longest for window in windows)
    # The routers of experts would count a shared prompt once.
    balances = bool(getattr(text, "output_router_logits", False))
    return is_full and not balances and set(getattr(text, "layer_types", None) or ()) <= _KINDS


def computes_shared_prompts(model: nn.Module, vocabulary: int, device: torch.device, tolerance: float) -> bool:
    """Return whether the second answer has the same loss behind a shared prompt as behind its own.

    Args:
        model: the model as training calls it.
        vocabulary: token ids below this are ordinary tokens.
        device: where the model is.
        tolerance: by how much the losses may differ, relative to them.
    """
    generator = torch.Generator().manual_seed(2)
    prompt, one, other = torch.randint(vocabulary, (3, _LENGTH), generator=generator)
    whole = torch.arange(2 * _LENGTH)
    apart = (torch.cat([prompt, one, prompt, other]), torch.cat([whole, whole]), [2 * _LENGTH, 2 * _LENGTH], [0, 0])
    joined = (
        torch.cat([prompt, one, other]),
        torch.cat([whole, whole[_LENGTH:]]),
        [2 * _LENGTH, _LENGTH],
        [0, _LENGTH],
    )
    first, second = (_loss_of_last(model, *line, device) for line in (apart, joined))
    return abs(first - second) <= tolerance * max(1.0, abs(first))


def _loss_of_last(
    model: nn.Module, ids: Tensor, positions: Tensor, lengths: list[int], shared: list[int], device: torch.device
) -> float:
    """Return the loss of the last tokens of a line."""
    labels = ids.clone()
    labels[: 1 - _LENGTH] = IGNORE_INDEX
    arguments: dict[str, Any] = {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}
    arguments |= cu_seqlens(lengths, shared)
    on_device = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in arguments.items()}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = model(**on_device, supervised=True).loss
    model.train(was_training)
    return float(loss)
