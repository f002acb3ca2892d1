"""Sampling settings: the user's, and the model's own with them."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.errors import UserError
from peftchat.models.decoding import decode_plainly

if TYPE_CHECKING:
    from transformers import GenerationConfig

DEFAULT_NEW_TOKENS = 1024
"""Most tokens of an answer if neither the model nor the user sets a limit."""


_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number above 0", lambda value: value > 0),
    "top_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "top_k": ("a whole number from 0 on", lambda value: value >= 0 and value == int(value)),
}
"""Sampling setting -> what its value has to be, and whether it is."""


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

    They are for one answer, decoded token by token (`peftchat.models.decoding`).
    """
    chosen = copy.deepcopy(settings)
    chosen.max_new_tokens = sampling.max_new_tokens or settings.max_new_tokens or DEFAULT_NEW_TOKENS
    chosen.max_length = None
    decode_plainly(chosen)
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
    _check_own(chosen)
    return chosen


def _check_own(settings: "GenerationConfig") -> None:
    """Check what transformers reads from the model's file as it is, and refuses when the first token is drawn.

    Raises:
        UserError: a setting is no number, or out of its range.
    """
    for name, (expected, fits) in _RANGES.items():
        value = getattr(settings, name, None)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and fits(value)):
            raise UserError(
                f"{name} is {value!r}, expected {expected}",
                where="generation_config.json of the model",
                hint="Correct it there.",
            )
