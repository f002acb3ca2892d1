"""Ordinary text through the `tokenizers` library, in parallel.

The library works on copies of the tokenizer in which every special token has another, secret spelling. So neither
its search for added tokens nor a vocabulary that holds the spelling as a piece (Unigram and word-level ones can)
makes a special token out of characters, and nothing else about the encoding changes.
"""

import json
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson

from peftchat.chatml.backend import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

State = dict[str, Any]

# Under these, the normal form of a text begins with the normal form of any beginning of it, or differs within that.
# Others can shrink several characters to one, across a border too.
_STEADY_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Prepend", "ByteLevel", "BertNormalizer",
}  # fmt: skip


class RustText:
    """Encodes ordinary text with a tokenizer of the `tokenizers` library.

    Args:
        tokenizer: the tokenizer; it is not changed.
        special: its special tokens, none of which any text becomes.
    """

    whitespace: str | None = (
        "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
        "\u2028\u2029\u202f\u205f\u3000"
    )
    """Unicode's White_Space, which the library's regular expressions go by; `str.strip` takes four more."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special: dict[str, int]) -> None:
        state: State = json.loads(tokenizer.backend_tokenizer.to_str())
        _disguise(state, special)
        self._first = _load(state)
        inner = _without_first_marker(state)
        self._inner = self._first if inner == state else _load(inner)
        self._steady = _is_steady(state["normalizer"])
        self._unknown = tokenizer.unk_token_id

    def encode(self, texts: Sequence[str], *, first: bool) -> list[list[int]]:
        """Ids of each text."""
        backend = self._first if first else self._inner
        return [item.ids for item in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_parts(self, texts: Sequence[Sequence[str]], *, first: bool) -> list[Tokens]:
        """Ids of each text, which comes in parts, and where each of its tokens lies."""
        backend = self._first if first else self._inner
        items = backend.encode_batch(["".join(parts) for parts in texts], add_special_tokens=False)
        return [Tokens(item.ids, _touched(parts, item.offsets)) for parts, item in zip(texts, items, strict=True)]

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether these ids stand for one text only."""
        return self._steady and self._unknown not in ids


def _touched(parts: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first and the last part that each (first character, one past the last) span covers."""
    owner = [number for number, part in enumerate(parts) for _ in part]
    last = len(owner) - 1
    return [(owner[min(start, last)], owner[min(max(stop - 1, start), last)]) for start, stop in spans]


def _load(state: State) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_buffer(orjson.dumps(state))


def _disguise(state: State, special: dict[str, int]) -> None:
    """Give the special tokens spellings that no text holds; ids stay. Takes out what works on finished sequences."""
    nonce = secrets.token_hex(8)
    names = {token: f"{nonce}-{token_id}" for token, token_id in special.items()}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        renamed = names.keys() & vocabulary.keys()
        for token in renamed:
            vocabulary[names[token]] = vocabulary.pop(token)
    else:
        renamed = names.keys() & {piece for piece, _ in vocabulary}
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in renamed:
        model["unk_token"] = names[model["unk_token"]]
    if renamed and "merges" in model:
        # A merge into, or out of, a token that now has another name would make the file unreadable.
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left not in renamed and right not in renamed and left + right not in renamed
        ]
    # The byte-level post-processor cuts spaces off the offsets; added BOS, truncation and padding have no place here.
    state["post_processor"] = state["truncation"] = state["padding"] = None


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


def _is_steady(normalizer: State | None) -> bool:
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(_is_steady(part) for part in normalizer["normalizers"])
    if normalizer["type"] == "Replace":
        return len(normalizer["pattern"].get("String", "")) == 1
    return normalizer["type"] in _STEADY_NORMALIZERS
