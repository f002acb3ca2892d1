"""Ordinary text through a tokenizer that is written in Python, one text at a time."""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from peftchat.chatml.backend import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SlowText:
    """Encodes ordinary text with a tokenizer that has no `tokenizers` library behind it.

    Args:
        tokenizer: the tokenizer; it is not changed.
        special: its special tokens, none of which any text becomes.
    """

    whitespace: str | None = None

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special: dict[str, int]) -> None:
        self._tokenizer = tokenizer
        self._special = {token: number for token, number in special.items() if number != tokenizer.unk_token_id}
        self._forbidden = frozenset(self._special.values())
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._added = {token: number for token, number in added.items() if token not in special}
        self._added_pattern = _any_of(self._added)

    def encode(self, texts: Sequence[str], *, first: bool) -> list[list[int]]:
        """Ids of each text; these tokenizers treat the start of a sequence like any other stretch."""
        return [self._encode(text) for text in texts]

    def encode_parts(self, texts: Sequence[Sequence[str]], *, first: bool) -> list[Tokens]:
        """Ids of each text, which comes in parts, and where each of its tokens lies.

        These tokenizers report no characters. A border is found by encoding the text before it alone: where the two
        part, a token straddles the border.
        """
        return [self._located(parts) for parts in texts]

    def spells(self, ids: Sequence[int]) -> bool:
        """Never certain here: what such a tokenizer does to its text is its own code."""
        return False

    def _located(self, parts: Sequence[str]) -> Tokens:
        ids = self._encode("".join(parts))
        first, last = [0] * len(ids), [0] * len(ids)
        for before in accumulate(parts[:-1]):
            alone = self._encode(before)
            common = 0
            while common < min(len(alone), len(ids)) and alone[common] == ids[common]:
                common += 1
            behind = common + (common < len(alone))
            first = [number + (place >= behind) for place, number in enumerate(first)]
            last = [number + (place >= common) for place, number in enumerate(last)]
        return Tokens(ids, list(zip(first, last, strict=True)))

    def _encode(self, text: str) -> list[int]:
        # Under `split_special_tokens` these tokenizers find no added token at all, not even the ordinary ones.
        parts = self._added_pattern.split(text) if self._added_pattern else [text]
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self._added[part])
            elif part:
                ids += self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        """Ids of text without added tokens.

        Some of these tokenizers hold a special token as a piece of their vocabulary, or look up an unknown stretch of
        text by its spelling. Cutting the spelling in two leaves nothing to find.
        """
        ids = self._raw(text)
        produced = self._forbidden.intersection(ids)
        pattern = _any_of([token for token, number in self._special.items() if number in produced])
        if pattern is None:
            return ids
        cuts = [match.start() + len(match.group()) // 2 for match in pattern.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        ids = [number for part in parts for number in self._raw(part)]
        if self._forbidden.isdisjoint(ids):
            return ids
        return [number for character in text for number in self._raw(character) if number not in self._forbidden]

    def _raw(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds the tokens, the longest first, in a group of its own."""
    by_length = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None
