"""Generation settings of a model, reduced to what writes one answer, token by token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

_OTHER_WAYS: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": None,
    "num_return_sequences": 1,
    "early_stopping": None,
    "length_penalty": None,
    "diversity_penalty": None,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "token_healing": False,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""Settings by which transformers searches among several answers, writes several tokens at a time, or returns more than
ids -> their neutral values.

Such an answer cannot be streamed or batched, and some of these ways load code from the hub
(https://github.com/huggingface/transformers/blob/main/src/transformers/generation/configuration_utils.py).
"""


def decode_plainly(settings: "GenerationConfig") -> None:
    """Change settings in place so that each step adds one token to one answer.

    What says which token is likely, and where an answer ends, stays.
    """
    for name, neutral in _OTHER_WAYS.items():
        if getattr(settings, name, None) is not None:
            setattr(settings, name, neutral)


@contextmanager
def decoding_plainly(settings: "GenerationConfig") -> Iterator[None]:
    """Do so for the time of the block.

    `generate` fills what its settings leave open from the model's own, so those have to be plain too.
    """
    before = dict(vars(settings))
    decode_plainly(settings)
    try:
        yield
    finally:
        vars(settings).clear()
        vars(settings).update(before)


def tokenizer_argument(settings: "GenerationConfig", tokenizer: Any) -> dict[str, Any]:
    """Return what `generate` needs beside settings with `stop_strings`: it looks for them in the text."""
    return {"tokenizer": tokenizer} if settings.stop_strings else {}
