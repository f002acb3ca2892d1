"""How the next token is chosen: the model's own settings, and what the user says instead."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig

DEFAULT_NEW_TOKENS = 1024
"""Longest answer where neither the model nor the user sets a limit."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The user's choices; None leaves each to the model's `generation_config.json`.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling (Holtzman et al., 2020).
        top_k: sample among so many tokens.
        greedy: always the likeliest token.
        seed: makes sampling repeatable.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse choices that contradict each other."""
        chosen = {"--temperature": self.temperature, "--top-p": self.top_p, "--top-k": self.top_k}
        first = next((flag for flag, value in chosen.items() if value), None)
        if self.greedy and first is not None:
            raise UserError(
                f"{first} says how to sample, and --greedy does not sample", where=first, cure="Leave one of them out."
            )


def apply_sampling(settings: "GenerationConfig", sampling: Sampling) -> "GenerationConfig":
    """A copy of the model's settings with the user's choices in it; one answer at a time, token by token."""
    chosen = copy.deepcopy(settings)
    chosen.max_new_tokens = sampling.max_new_tokens or settings.max_new_tokens or DEFAULT_NEW_TOKENS
    chosen.max_length = None
    chosen.num_beams = 1
    chosen.num_return_sequences = 1
    if sampling.temperature or sampling.top_p is not None or sampling.top_k is not None:
        chosen.do_sample = True
    if sampling.greedy or sampling.temperature == 0:
        chosen.do_sample = False
    if not chosen.do_sample:
        chosen.temperature = chosen.top_p = chosen.top_k = None
        return chosen
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(sampling, name)
        if value is not None:
            setattr(chosen, name, value)
    return chosen
