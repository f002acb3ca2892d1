"""Conversations to rows: ids and their codes, built side by side, piece by piece."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from peftchat.chatml.mask import Codes, Ids, Part, part_of
from peftchat.chatml.template import Piece, Template
from peftchat.chatml.text import TextEncoder
from peftchat.conversation import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Row:
    """One encoded conversation.

    Attributes:
        ids: token ids, int32, shape (T,).
        codes: what each token is (`peftchat.chatml.mask`), uint8, shape (T,).
        source: where the conversation came from, `file:line`.
        lookalikes: stretches of its messages spelled like a special token, encoded as ordinary text.
    """

    ids: Ids
    codes: Codes
    source: str
    lookalikes: int


@dataclass(slots=True)
class _Chunk:
    """Ordinary text between two special tokens, in stretches of one code each."""

    spans: list[tuple[str, int]]
    first: bool

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)


@dataclass(slots=True)
class _Plan:
    """A conversation before its text is encoded: special tokens as (id, code), text as chunks."""

    source: str
    lookalikes: int
    items: list["tuple[int, int] | _Chunk"] = field(default_factory=list)


# A token that straddles two stretches belongs to the one that comes first here: what the model must write wins.
_PRECEDENCE = {Part.CONTENT: 0, Part.END: 1, Part.HEADER: 2, Part.TRAILER: 3, Part.OUTSIDE: 4}


class RowEncoder:
    """Encodes conversations with one tokenizer and one template.

    The ids equal those of `apply_chat_template(tokenize=True)` on conversations whose messages hold no text that is
    spelled like a special token; where they do, that text is encoded as ordinary text.

    Args:
        tokenizer: a tokenizer that already has the template's tokens
            (`peftchat.chatml.tokens.add_template_tokens`).
        template: the format.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
        self._template = template
        self._text = TextEncoder(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._strips_right = {token.content for token in added.values() if token.rstrip}
        self._strips_left = {token.content for token in added.values() if token.lstrip}
        self._constant: dict[tuple[str, bool], list[int]] = {}

    def encode(self, conversations: Iterable[Conversation]) -> list[Row]:
        """Rows of the conversations, in order; their text goes through the tokenizer as one batch."""
        plans = [self._plan(conversation) for conversation in conversations]
        encoded = self._encode_chunks([item for plan in plans for item in plan.items if isinstance(item, _Chunk)])
        rows = []
        position = 0
        for plan in plans:
            ids: list[int] = []
            codes = bytearray()
            for item in plan.items:
                if isinstance(item, _Chunk):
                    ids += encoded[position]
                    codes += self._codes(item, encoded[position])
                    position += 1
                else:
                    ids.append(item[0])
                    codes.append(item[1])
            rows.append(
                Row(
                    np.array(ids, dtype=np.int32),
                    np.frombuffer(bytes(codes), dtype=np.uint8),
                    plan.source,
                    plan.lookalikes,
                )
            )
        return rows

    def _plan(self, conversation: Conversation) -> _Plan:
        lookalikes = sum(self._text.lookalikes(message.content) for message in conversation.messages)
        plan = _Plan(conversation.source, lookalikes)
        spans: list[tuple[str, int]] = []
        strip = False
        for piece in self._template.pieces(conversation):
            if not piece.special:
                text = piece.text.lstrip() if strip else piece.text
                strip = strip and not text
                if text:
                    spans.append((text, piece.code))
                continue
            if piece.text in self._strips_left:
                spans = _right_stripped(spans)
            self._close(plan, spans)
            spans = []
            plan.items.append((self._text.special[piece.text], piece.code))
            strip = piece.text in self._strips_right
        self._close(plan, spans)
        return plan

    @staticmethod
    def _close(plan: _Plan, spans: list[tuple[str, int]]) -> None:
        if spans:
            plan.items.append(_Chunk(spans, first=not plan.items))

    def _encode_chunks(self, chunks: Sequence[_Chunk]) -> list[list[int]]:
        """Ids of every chunk; text that comes from a template, not a message, is encoded once for all."""
        encoded: list[list[int]] = [[]] * len(chunks)
        for first in (False, True):
            fresh = []
            for index, chunk in enumerate(chunks):
                if chunk.first != first:
                    continue
                if len(chunk.spans) == 1 and part_of(chunk.spans[0][1]) != Part.CONTENT:
                    encoded[index] = self._constant_ids(chunk.spans[0][0], first=first)
                else:
                    fresh.append(index)
            texts = [chunks[index].text for index in fresh]
            for index, ids in zip(fresh, self._text.encode(texts, first=first), strict=True):
                encoded[index] = ids
        return encoded

    def _constant_ids(self, text: str, *, first: bool) -> list[int]:
        key = (text, first)
        if key not in self._constant:
            self._constant[key] = self._text.encode([text], first=first)[0]
        return self._constant[key]

    def _codes(self, chunk: _Chunk, ids: list[int]) -> bytes:
        """One code a token, by the characters that the token covers."""
        spans = chunk.spans
        if len(spans) == 1:
            return bytes([spans[0][1]]) * len(ids)
        if len(spans) == 2:
            # Ids that begin with the ids of the first stretch cover it exactly: no token straddles the border.
            head = self._constant_ids(spans[0][0], first=chunk.first)
            if ids[: len(head)] == head:
                return bytes([spans[0][1]]) * len(head) + bytes([spans[1][1]]) * (len(ids) - len(head))
        covered = self._text.spans(chunk.text, first=chunk.first)
        if covered is None or len(covered) != len(ids):
            covered = self._spans_by_prefix(chunk, len(ids))
        return bytes(_code_at(spans, start, stop) for start, stop in covered)

    def _spans_by_prefix(self, chunk: _Chunk, count: int) -> list[tuple[int, int]]:
        """Spans for tokenizers that report none: each stretch gets as many tokens as it has alone."""
        covered: list[tuple[int, int]] = []
        start = 0
        for text, _ in chunk.spans:
            alone = len(self._constant_ids(text, first=chunk.first and start == 0))
            covered += [(start, start + len(text))] * alone
            start += len(text)
        return (covered + [covered[-1]] * count)[:count]


def _right_stripped(spans: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The stretches without the white space at their end, as a token with `lstrip` leaves them."""
    while spans:
        text = spans[-1][0].rstrip()
        if text:
            return [*spans[:-1], (text, spans[-1][1])]
        spans = spans[:-1]
    return []


def _code_at(spans: list[tuple[str, int]], start: int, stop: int) -> int:
    """The code of a token that covers the characters from `start` to `stop` of the joined stretches."""
    touched = []
    position = 0
    for text, value in spans:
        end = position + len(text)
        if (start < end and position < stop) or (start == stop and position <= start < end):
            touched.append(value)
        position = end
    if not touched:
        return spans[-1][1]
    return min(touched, key=lambda value: _PRECEDENCE[part_of(value)])


def rendered(pieces: Iterable[Piece]) -> str:
    """The text that the pieces spell."""
    return "".join(piece.text for piece in pieces)
