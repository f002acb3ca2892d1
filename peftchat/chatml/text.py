"""Ordinary text to ids, as the tokenizer would encode it between two special tokens.

Two things set this apart from calling the tokenizer: text that looks like a special token is not one, and a
stretch is encoded as it would be in the middle of a sequence, without the marker that some tokenizers put before
the first word of a text.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftchat.chatml.tokens import special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]
"""(first character, one past the last character) for each token."""


class TextEncoder:
    """Encodes ordinary text with one tokenizer.

    Args:
        tokenizer: any tokenizer that transformers loads; it is not changed. With the `tokenizers` library behind it,
            batches are encoded in parallel and `spans` is exact; without, texts are encoded one by one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.special = special_tokens(tokenizer)
        self._tokenizer = tokenizer
        unknown = tokenizer.unk_token_id
        self._forbidden = frozenset(self.special.values()) - {unknown}
        by_length = sorted(self.special, key=len, reverse=True)
        self._lookalike = re.compile("|".join(map(re.escape, by_length))) if by_length else None
        self._inner: Tokenizer | None = None
        self._first: Tokenizer | None = None
        if tokenizer.is_fast:
            self._inner, self._first = _backends(tokenizer)

    def lookalikes(self, text: str) -> int:
        """How many stretches of the text are spelled like a special token."""
        return len(self._lookalike.findall(text)) if self._lookalike else 0

    def encode(self, texts: Sequence[str], *, first: bool = False) -> list[list[int]]:
        """Ids of each text, with no special token among them.

        Args:
            texts: ordinary text.
            first: whether the texts stand at the very start of their sequences.
        """
        ids = self._raw(texts, first=first)
        for index, row in enumerate(ids):
            if not self._forbidden.isdisjoint(row):
                ids[index] = self._broken_up(texts[index], first=first)
        return ids

    def spans(self, text: str, *, first: bool = False) -> Spans | None:
        """The characters that each token of the text covers; None where the tokenizer cannot tell."""
        backend = self._first if first else self._inner
        if backend is None:
            return None
        spans: Spans = backend.encode(text, add_special_tokens=False).offsets
        return spans

    def _raw(self, texts: Sequence[str], *, first: bool) -> list[list[int]]:
        backend = self._first if first else self._inner
        if backend is None:
            # Tokenizers without the Rust library read `split_special_tokens` from the call.
            return [self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
        return [item.ids for item in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _broken_up(self, text: str, *, first: bool) -> list[int]:
        """Ids of a text in which the vocabulary itself holds a special token as a piece.

        Unigram and word-level vocabularies can contain their control tokens, and then produce them from plain
        characters. Cutting the spelling in two leaves no piece that could.
        """
        assert self._lookalike is not None
        ids: list[int] = []
        start = 0
        cuts = [match.start() + max(1, len(match.group()) // 2) for match in self._lookalike.finditer(text)]
        for cut in [*cuts, len(text)]:
            part = self._raw([text[start:cut]], first=first and start == 0)[0]
            if not self._forbidden.isdisjoint(part):
                part = [token_id for char in text[start:cut] for token_id in self._raw([char], first=False)[0]]
            ids.extend(token_id for token_id in part if token_id not in self._forbidden)
            start = cut
        return ids


def _backends(tokenizer: "PreTrainedTokenizerBase") -> tuple["Tokenizer", "Tokenizer"]:
    """Copies of the tokenizer for text inside a sequence and at its start."""
    from tokenizers import Tokenizer

    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    copies = []
    for inner in (True, False):
        copy = Tokenizer.from_str(json.dumps(_without_first_marker(state) if inner else state))
        copy.encode_special_tokens = True
        copy.no_truncation()
        copy.no_padding()
        copies.append(copy)
    return copies[0], copies[1]


def _without_first_marker(state: Any) -> Any:
    """The tokenizer's state in which "mark the first word of a text" reads "never mark"."""
    if isinstance(state, list):
        return [_without_first_marker(item) for item in state]
    if not isinstance(state, dict):
        return state
    if state.get("type") == "Metaspace" and state.get("prepend_scheme") == "first":
        return {**state, "prepend_scheme": "never"}
    # The vocabulary is large and holds no settings.
    return {
        key: value if key in ("vocab", "merges", "added_tokens") else _without_first_marker(value)
        for key, value in state.items()
    }
