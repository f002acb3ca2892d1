"""What encoding asks of a tokenizer, whichever library stands behind it."""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import orjson

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


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text that was given in parts.

    Attributes:
        ids: token ids.
        parts: for each token, the first and the last part whose characters it covers.
    """

    ids: list[int]
    parts: list[tuple[int, int]]


class TextBackend(Protocol):
    """A way to turn ordinary text into ids."""

    @property
    def whitespace(self) -> str | None:
        """The characters that a token with `rstrip` or `lstrip` takes with it; None for those of `str.strip`."""

    def encode(self, texts: Sequence[str], *, first: bool) -> list[list[int]]:
        """Ids of each text."""
        ...

    def encode_parts(self, texts: Sequence[Sequence[str]], *, first: bool) -> list[Tokens]:
        """Ids of each text, which comes in parts, and where each of its tokens lies."""
        ...

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether these ids stand for one text only, so that a text whose ids begin with them begins with it."""
        ...


State = dict[str, Any]

# Under these, the normal form of a text begins with the normal form of any beginning of it, or differs within that.
# Others can shrink several characters to one, across a border too.
_STEADY_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Prepend", "ByteLevel", "BertNormalizer",
}  # fmt: skip


class FastTextEncoder:
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


class SlowTextEncoder:
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


def _backend(tokenizer: "PreTrainedTokenizerBase", special: dict[str, int]) -> TextBackend:
    return FastTextEncoder(tokenizer, special) if tokenizer.is_fast else SlowTextEncoder(tokenizer, special)
