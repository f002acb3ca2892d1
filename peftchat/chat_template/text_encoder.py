"""Ordinary text to token ids, by a fast (`tokenizers`) or a slow tokenizer, never to a special token."""

import itertools
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from peftchat.chat_template.covered_spans import TokenBytes, covered, covered_by_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return every special token of the tokenizer with its id: the named ones and all that were added as special."""
    found = {
        str(token.content): int(token_id) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for token in tokenizer.all_special_tokens:
        found.setdefault(str(token), int(tokenizer.convert_tokens_to_ids(str(token))))
    return found


_BEFORE = ("|", "x", "\n")
"""Texts to put in front of a text that no start marker belongs to. The last that does not merge with it is used."""


@dataclass(frozen=True, slots=True)
class SpanTokens:
    """The tokens of a text that was given in spans.

    Attributes:
        ids: token ids.
        spans: for each token, the indices of the first and the last span whose characters it covers.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class TextBackend(Protocol):
    """The interface of fast and slow text encoders."""

    @property
    def whitespace(self) -> str | None:
        """The characters that a token with `rstrip` or `lstrip` strips; None for those of `str.strip`."""

    def encode(self, texts: Sequence[str], *, at_start: bool) -> list[list[int]]:
        """Return the ids of each text."""
        ...

    def encode_spans(self, texts: Sequence[Sequence[str]], *, at_start: bool) -> list[SpanTokens]:
        """Return the ids of each text, which is given in spans, and the spans that each token covers."""
        ...

    def is_prefix_stable(self, ids: Sequence[int]) -> bool:
        """Return whether a text whose ids start with these always starts with the one text that they decode to."""
        ...


State = dict[str, Any]

# With these, the normal form of a text starts with the normal form of each of its prefixes, or differs within that
# prefix. Other normalizers can replace several characters by one, even where a prefix ends between them.
_PREFIX_STABLE_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Prepend", "ByteLevel", "BertNormalizer",
}  # fmt: skip


class FastTextEncoder:
    """Encodes ordinary text with a tokenizer of the `tokenizers` library.

    Args:
        tokenizer: the tokenizer; it is not changed.
        special: its special tokens. No text is encoded as one of them.
    """

    whitespace: str | None = (
        "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
        "\u2028\u2029\u202f\u205f\u3000"
    )
    """Unicode's White_Space, which the library's regular expressions use. `str.strip` strips four more."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special: dict[str, int]) -> None:
        state: State = orjson.loads(tokenizer.backend_tokenizer.to_str())
        _rename_special_tokens(state, special)
        self._at_start = _load(state)
        inner = _without_first_word_marker(state)
        self._inner = self._at_start if inner == state else _load(inner)
        self._prefix_stable = _is_prefix_stable(state["normalizer"])
        self._unk_token_id = tokenizer.unk_token_id
        self._byte_level = (state.get("decoder") or {}).get("type") == "ByteLevel"
        self._bytes = TokenBytes(self._inner)

    def encode(self, texts: Sequence[str], *, at_start: bool) -> list[list[int]]:
        """Return the ids of each text."""
        tokenizer = self._at_start if at_start else self._inner
        return [item.ids for item in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, texts: Sequence[Sequence[str]], *, at_start: bool) -> list[SpanTokens]:
        """Return the ids of each text, which is given in spans, and the spans that each token covers."""
        tokenizer = self._at_start if at_start else self._inner
        if not self._byte_level:
            return self._encode_with_offsets(tokenizer, texts)
        joined = ["".join(spans) for spans in texts]
        found: dict[int, SpanTokens] = {}
        for number, item in enumerate(tokenizer.encode_batch_fast(joined, add_special_tokens=False)):
            ids = item.ids
            spans = covered_by_bytes(texts[number], joined[number], list(map(self._bytes.__getitem__, ids)))
            if spans is not None:
                found[number] = SpanTokens(ids, spans)
        others = [number for number in range(len(texts)) if number not in found]
        located = self._encode_with_offsets(tokenizer, [texts[number] for number in others]) if others else []
        found.update(zip(others, located, strict=True))
        return [found[number] for number in range(len(texts))]

    @staticmethod
    def _encode_with_offsets(tokenizer: "Tokenizer", texts: Sequence[Sequence[str]]) -> list[SpanTokens]:
        """Return the same by the library's offsets, which take it twice as long as the ids alone."""
        items = tokenizer.encode_batch(["".join(spans) for spans in texts], add_special_tokens=False)
        return [SpanTokens(item.ids, covered(spans, item.offsets)) for spans, item in zip(texts, items, strict=True)]

    def is_prefix_stable(self, ids: Sequence[int]) -> bool:
        """Return whether a text whose ids start with these always starts with the one text that they decode to."""
        return self._prefix_stable and self._unk_token_id not in ids


def _load(state: State) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_buffer(orjson.dumps(state))


def _rename_special_tokens(state: State, special: dict[str, int]) -> None:
    """Rename the special tokens, with the same ids, so that no text contains one; remove post-processing."""
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
        # The library does not load merges of a token that is no longer in the vocabulary.
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left not in renamed and right not in renamed and left + right not in renamed
        ]
    # The byte-level post-processor trims spaces from the offsets. BOS, truncation and padding are added elsewhere.
    state["post_processor"] = state["truncation"] = state["padding"] = None


def _without_first_word_marker(state: Any) -> Any:
    """Return the tokenizer's state with Metaspace's `prepend_scheme: first` changed to `never`."""
    if isinstance(state, list):
        return [_without_first_word_marker(item) for item in state]
    if not isinstance(state, dict):
        return state
    if state.get("type") == "Metaspace" and state.get("prepend_scheme") == "first":
        return {**state, "prepend_scheme": "never"}
    # The vocabulary is large and holds no settings.
    return {
        key: value if key in ("vocab", "merges", "added_tokens") else _without_first_word_marker(value)
        for key, value in state.items()
    }


def _is_prefix_stable(normalizer: State | None) -> bool:
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(_is_prefix_stable(part) for part in normalizer["normalizers"])
    if normalizer["type"] == "Replace":
        return len(normalizer["pattern"].get("String", "")) == 1
    return normalizer["type"] in _PREFIX_STABLE_NORMALIZERS


class SlowTextEncoder:
    """Encodes ordinary text with a slow tokenizer, one that does not use the `tokenizers` library.

    Args:
        tokenizer: the tokenizer; it is not changed.
        special: its special tokens. No text is encoded as one of them.
    """

    whitespace: str | None = None

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special: dict[str, int]) -> None:
        self._tokenizer = tokenizer
        self._special = {token: token_id for token, token_id in special.items() if token_id != tokenizer.unk_token_id}
        self._special_ids = frozenset(self._special.values())
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._added = {token: token_id for token, token_id in added.items() if token not in special}
        self._added_pattern = _any_of(self._added)

    def encode(self, texts: Sequence[str], *, at_start: bool) -> list[list[int]]:
        """Return the ids of each text. These tokenizers treat the start of a sequence like any other text."""
        return [self._encode(text) for text in texts]

    def encode_spans(self, texts: Sequence[Sequence[str]], *, at_start: bool) -> list[SpanTokens]:
        """Return the ids of each text, which is given in spans, and the spans that each token covers.

        These tokenizers report no character offsets. The text up to a boundary is encoded alone. If its ids differ from
        the first ids of the full text, a token spans the boundary.
        """
        return [self._encode_one_by_spans(spans) for spans in texts]

    def is_prefix_stable(self, ids: Sequence[int]) -> bool:
        """Return False: a slow tokenizer may change text in ways that its ids do not show."""
        return False

    def _encode_one_by_spans(self, spans: Sequence[str]) -> SpanTokens:
        ids = self._encode("".join(spans))
        first, last = [0] * len(ids), [0] * len(ids)
        for prefix in itertools.accumulate(spans[:-1]):
            prefix_ids = self._encode(prefix)
            common = 0
            while common < min(len(prefix_ids), len(ids)) and prefix_ids[common] == ids[common]:
                common += 1
            behind = common + (common < len(prefix_ids))
            first = [span + (index >= behind) for index, span in enumerate(first)]
            last = [span + (index >= common) for index, span in enumerate(last)]
        return SpanTokens(ids, list(zip(first, last, strict=True)))

    def _encode(self, text: str) -> list[int]:
        # With `split_special_tokens` these tokenizers find no added token at all, not even an ordinary one.
        parts = self._added_pattern.split(text) if self._added_pattern else [text]
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._added[part])
            elif part:
                ids += self._encode_without_added(part)
        return ids

    def _encode_without_added(self, text: str) -> list[int]:
        """Return the ids of text that contains no added token.

        Some of these tokenizers have a special token as a piece of their vocabulary, or look up unknown text by its
        spelling. Both find nothing once the spelling is cut in two.
        """
        ids = self._tokenize(text)
        produced = self._special_ids.intersection(ids)
        pattern = _any_of([token for token, token_id in self._special.items() if token_id in produced])
        if pattern is None:
            return ids
        cuts = [match.start() + len(match.group()) // 2 for match in pattern.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        ids = [token_id for part in parts for token_id in self._tokenize(part)]
        if self._special_ids.isdisjoint(ids):
            return ids
        by_character = (token_id for character in text for token_id in self._tokenize(character))
        return [token_id for token_id in by_character if token_id not in self._special_ids]

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern with one group that matches any of the tokens, the longest first."""
    by_length = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None


class TextEncoder:
    """Encodes ordinary text with one tokenizer.

    Args:
        tokenizer: any tokenizer that transformers loads; it is not changed. A fast one encodes batches in parallel, a
            slow one encodes one text after the other.

    Attributes:
        special: the tokenizer's special tokens and their ids.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.special = special_tokens(tokenizer)
        # A tokenizer with a special token of one character has no other token for that character, so text may use it.
        spellings = sorted((token for token in self.special if len(token) > 1), key=len, reverse=True)
        self._special_token_text = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._backend = _backend(tokenizer, {token: self.special[token] for token in spellings})
        alone, first, both = self.encode(["\n", "x", "x\n"])
        self._marks_starts = both != first + alone

    @property
    def whitespace(self) -> str | None:
        """The characters that a token with `rstrip` or `lstrip` strips; None for those of `str.strip`."""
        return self._backend.whitespace

    def count_special_token_text(self, texts: Sequence[str]) -> list[int]:
        """Return how often each text contains text that is spelled like a special token."""
        # Nearly always there is none, which one search through everything finds out.
        if self._special_token_text is None or self._special_token_text.search("\n".join(texts)) is None:
            return [0] * len(texts)
        return [len(self._special_token_text.findall(text)) for text in texts]

    def encode(self, texts: Sequence[str], *, at_start: bool = False) -> list[list[int]]:
        """Return the ids of each text. No id of a special token is among them.

        Args:
            texts: ordinary text.
            at_start: whether each text is the very start of its sequence.
        """
        return self._backend.encode(texts, at_start=at_start)

    def encode_behind(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that stand behind other text, where no token spans the border.

        Some tokenizers put a `▁` in front of all text that they are given. Text in the middle of a line has none, so
        such a tokenizer gets the text behind a word, whose ids are removed.
        """
        found = self.encode(texts)
        for before in _BEFORE if self._marks_starts else ():
            (ids,) = self.encode([before])
            for index, joined in enumerate(self.encode([before + text for text in texts])):
                if joined[: len(ids)] == ids:
                    found[index] = joined[len(ids) :]
        return found

    def encode_spans_behind(self, texts: Sequence[Sequence[str]]) -> list[SpanTokens]:
        """Return the same for texts that are given in spans, with the spans that each token covers."""
        found = self.encode_spans(texts)
        for before in _BEFORE if self._marks_starts else ():
            (ids,) = self.encode([before])
            for index, joined in enumerate(self.encode_spans([(before, *spans) for spans in texts])):
                if joined.ids[: len(ids)] == ids:
                    covered = [(max(first - 1, 0), max(last - 1, 0)) for first, last in joined.spans[len(ids) :]]
                    found[index] = SpanTokens(joined.ids[len(ids) :], covered)
        return found

    def encode_spans(self, texts: Sequence[Sequence[str]], *, at_start: bool = False) -> list[SpanTokens]:
        """Return the same for texts that are given in spans, with the spans that each token covers."""
        return self._backend.encode_spans(texts, at_start=at_start)

    def is_prefix_stable(self, ids: Sequence[int]) -> bool:
        """Return whether a text whose ids start with these always starts with the one text that they decode to."""
        return self._backend.is_prefix_stable(ids)


def _backend(tokenizer: "PreTrainedTokenizerBase", special: dict[str, int]) -> TextBackend:
    return FastTextEncoder(tokenizer, special) if tokenizer.is_fast else SlowTextEncoder(tokenizer, special)
