"""Prompts of several lengths in one batch: padded on the left, because a model goes on behind the last position."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig

_READ_THE_PROMPT = ("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty")
"""Settings that look at all ids before the next one, so that padding would change an answer."""


def needs_single_prompts(settings: "GenerationConfig") -> str | None:
    """Return the first setting that forbids padding; None where there is none."""
    neutral = {None, 0, 1.0}
    return next((name for name in _READ_THE_PROMPT if getattr(settings, name, None) not in neutral), None)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids of all prompts and the mask that leaves the padding out: int64, both of shape (N, longest)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
