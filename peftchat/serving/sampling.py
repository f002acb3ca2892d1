"""Sampling settings: the user's, and the model's own with them."""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig

DEFAULT_NEW_TOKENS = 1024
"""Most tokens of an answer if neither the model nor the user sets a limit."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The user's sampling settings.

    None keeps the value of the model's `generation_config.json`.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus sampling (Holtzman et al., 2020).
        top_k: sample from the `top_k` most likely tokens.
        greedy: always take the most likely token.
        seed: makes sampling reproducible.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Reject a temperature without end, and settings that contradict each other."""
        if self.temperature is not None and not math.isfinite(self.temperature):
            what = f"the temperature is {self.temperature}, expected a finite number"
            raise UserError(what, where="--temperature", hint="Write for example 0.7.")
        flags = {"--temperature": self.temperature, "--top-p": self.top_p, "--top-k": self.top_k}
        first = next((flag for flag, value in flags.items() if value), None)
        if self.greedy and first is not None:
            raise UserError(
                f"{first} sets how to sample, but --greedy does not sample", where=first, hint="Remove one of them."
            )


def apply_sampling(settings: "GenerationConfig", sampling: Sampling) -> "GenerationConfig":
    """Return a copy of the model's settings with the user's in it.

    They are for one answer, without beam search.
    """
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
