"""Ordinary text to ids, as the tokenizer would encode it between two special tokens.

Two things set this apart from calling the tokenizer: text that looks like a special token is not one, and a
stretch is encoded as it would be in the middle of a sequence, without the marker that some tokenizers put before
the first word of a text.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftchat.chatml.backend import Backend, Tokens
from peftchat.chatml.rust_text import RustText
from peftchat.chatml.slow_text import SlowText
from peftchat.chatml.tokens import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEncoder:
    """Encodes ordinary text with one tokenizer.

    Args:
        tokenizer: any tokenizer that transformers loads; it is not changed. With the `tokenizers` library behind it,
            batches are encoded in parallel; without, texts are encoded one by one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.special = special_tokens(tokenizer)
        # A single character has no other spelling: a tokenizer that made one special needs it to write the character.
        spellings = sorted((token for token in self.special if len(token) > 1), key=len, reverse=True)
        self._lookalike = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._backend = _backend(tokenizer, {token: self.special[token] for token in spellings})

    @property
    def whitespace(self) -> str | None:
        """The characters that a token with `rstrip` or `lstrip` takes with it; None for those of `str.strip`."""
        return self._backend.whitespace

    def lookalikes(self, texts: Sequence[str]) -> list[int]:
        """How many stretches of each text are spelled like a special token."""
        # Nearly always none is: one search through everything says so at once.
        if self._lookalike is None or self._lookalike.search("\n".join(texts)) is None:
            return [0] * len(texts)
        return [len(self._lookalike.findall(text)) for text in texts]

    def encode(self, texts: Sequence[str], *, first: bool = False) -> list[list[int]]:
        """Ids of each text, with no special token among them.

        Args:
            texts: ordinary text.
            first: whether the texts stand at the very start of their sequences.
        """
        return self._backend.encode(texts, first=first)

    def encode_parts(self, texts: Sequence[Sequence[str]], *, first: bool = False) -> list[Tokens]:
        """The same, for texts in parts, with the parts that each token covers."""
        return self._backend.encode_parts(texts, first=first)

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether these ids stand for one text only, so that a text whose ids begin with them begins with it."""
        return self._backend.spells(ids)


def _backend(tokenizer: "PreTrainedTokenizerBase", special: dict[str, int]) -> Backend:
    return RustText(tokenizer, special) if tokenizer.is_fast else SlowText(tokenizer, special)
