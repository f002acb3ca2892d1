"""Rows of the block formats, where all but the contents is known beforehand.

Between two special tokens of such a format stands the end of a header and one content. Only that stretch goes through
the tokenizer; the ids around it, and the codes of everything, are made once for each kind of turn.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.examples import EncodedExample, ExampleBatch, TokenIds, TokenTags
from peftchat.chat_template.loss_mask import TurnPart, part_of, precedence, token_tag
from peftchat.chat_template.templates import ChatTemplate, TemplateSpan
from peftchat.chat_template.text_encoder import TextEncoder
from peftchat.conversation import Conversation, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Turn:
    """What all turns of one role have in common.

    Attributes:
        before: ids in front of the header's text.
        head: the header's text, which is encoded together with the content.
        head_ids: its ids, where it stands alone.
        after: ids of the end token and of the trailer behind it.
        values: the codes of `before`, `head`, the content, the end token and the trailer.
    """

    before: list[int]
    head: str
    head_ids: list[int]
    after: list[int]
    values: bytes


class BlockEncoder:
    """Encodes conversations in a block format.

    Args:
        text: encodes ordinary text.
        template: a format that `supports` accepts.
    """

    def __init__(self, text: TextEncoder, template: ChatTemplate) -> None:
        self._text = text
        self._template = template
        self._bos: _Turn | None = None
        if template.bos_token is not None:
            tag = token_tag(TurnPart.OUTSIDE)
            self._bos = _Turn([text.special[template.bos_token]], "", [], [], bytes([tag, tag, tag]))
        self._turns = {(role, last): self._turn(role, last) for role in template.headers for last in (False, True)}

    @staticmethod
    def supports(text: TextEncoder, template: ChatTemplate) -> bool:
        """Whether every header is special tokens and then one text, whose ids alone tell where it ends."""
        return all(
            len(header) > 1
            and all(special for _, special in header[:-1])
            and not header[-1][1]
            and text.spells(text.encode([header[-1][0]])[0])
            for header in map(template.header_spans, template.headers)
        )

    def _turn(self, role: Role, last: bool) -> _Turn:
        *specials, (head, _) = self._template.header_spans(role)
        head_ids, trailer = self._text.encode([head, self._template.trailer])
        parts = (TurnPart.HEADER, TurnPart.HEADER, TurnPart.CONTENT, TurnPart.END, *[TurnPart.TRAILER] * len(trailer))
        return _Turn(
            [self._text.special[token] for token, _ in specials],
            head,
            head_ids,
            [self._text.special[self._template.end_token], *trailer],
            bytes(token_tag(part, role, last_answer=last) for part in parts),
        )

    def batch(self, conversations: Iterable[Conversation]) -> ExampleBatch:
        """Rows of the conversations, in order.

        Raises:
            UserError: the format cannot write one of them.
        """
        turns: list[_Turn] = []
        contents: list[str] = []
        ends: list[int] = []
        sources: list[str] = []
        said: list[str] = []
        said_ends: list[int] = []
        for conversation in conversations:
            said += [message.content for message in conversation.messages]
            said_ends.append(len(said))
            if self._bos is not None:
                turns.append(self._bos)
                contents.append("")
            for role, content, last in self._template.turns(conversation):
                turns.append(self._turns[role, last])
                contents.append(content)
            ends.append(len(turns))
            sources.append(conversation.source)
        encoded = self._text.encode([turn.head + content for turn, content in zip(turns, contents, strict=True)])
        ids, codes, starts = _laid_out(turns, encoded, self._straddled(turns, contents, encoded))
        alike = np.cumsum([0, *self._text.lookalikes(said)])
        lookalikes = np.diff(alike[[0, *said_ends]]).astype(np.int32)
        return ExampleBatch(ids, codes, starts[[0, *ends]], sources, lookalikes)

    def _straddled(
        self, turns: Sequence[_Turn], contents: Sequence[str], encoded: Sequence[list[int]]
    ) -> dict[int, bytes]:
        """For each turn with a token that covers both header and content: the codes of the ids of the two."""
        found = [
            number
            for number, (turn, ids) in enumerate(zip(turns, encoded, strict=True))
            if ids[: len(turn.head_ids)] != turn.head_ids
        ]
        located = self._text.encode_parts([(turns[number].head, contents[number]) for number in found])
        codes: dict[int, bytes] = {}
        for number, tokens in zip(found, located, strict=True):
            values = turns[number].values[1:3]
            winner = min(values, key=precedence)
            codes[number] = bytes(values[first] if first == last else winner for first, last in tokens.parts)
        return codes


def _laid_out(
    turns: Sequence[_Turn], encoded: Sequence[list[int]], straddled: Mapping[int, bytes]
) -> tuple[TokenIds, TokenTags, npt.NDArray[np.int64]]:
    """Ids and codes of all turns end to end, and where each turn begins.

    Args:
        turns: what surrounds the contents.
        encoded: ids of each header's text and content.
        straddled: codes of those ids where they do not simply follow from the header's length.
    """
    ids: list[int] = []
    values = bytearray()  # codes, each to be repeated as often as `counts` says
    counts: list[int] = []
    lengths: list[int] = []
    for number, (turn, middle) in enumerate(zip(turns, encoded, strict=True)):
        ids += turn.before
        ids += middle
        ids += turn.after
        head = len(turn.head_ids)
        if number in straddled:
            values += turn.values[:1] + straddled[number] + turn.values[3:]
            counts += (len(turn.before), *[1] * (len(middle) + len(turn.after)))
        else:
            values += turn.values
            counts += (len(turn.before), head, len(middle) - head, *[1] * len(turn.after))
        lengths.append(len(turn.before) + len(middle) + len(turn.after))
    codes = np.repeat(np.frombuffer(values, dtype=np.uint8), counts)
    return np.array(ids, dtype=np.int32), codes, np.cumsum([0, *lengths], dtype=np.int64)


@dataclass(slots=True)
class _Chunk:
    """Ordinary text between two special tokens, in stretches of one code each.

    Attributes:
        texts: the stretches.
        values: their codes; no two in a row are equal.
        first: whether the chunk begins the sequence.
    """

    texts: list[str]
    values: list[int]
    first: bool


@dataclass(slots=True)
class _Plan:
    """A conversation before its text is encoded: special tokens as (id, code), text as chunks."""

    source: str
    lookalikes: int
    items: list["tuple[int, int] | _Chunk"] = field(default_factory=list)


_Encoded = tuple[list[int], bytes]
"""Ids of a chunk and their codes."""


class Template(Protocol):
    """What encoding needs of a chat template."""

    def spans(self, conversation: Conversation) -> Iterator[TemplateSpan]:
        """Yield the conversation as spans of text."""
        ...


class ChatEncoder:
    """Encodes conversations with one tokenizer and one template.

    The ids equal those of `apply_chat_template(tokenize=True)` on conversations whose messages hold no text that is
    spelled like a special token; where they do, that text is encoded as ordinary text.

    Args:
        tokenizer: a tokenizer that already has the template's tokens
            (`peftchat.chat_template.chat_format.add_template_tokens`).
        template: the format.

    Attributes:
        parallel: whether the tokenizer lets other threads run while it works.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
        self.parallel = tokenizer.is_fast
        self._template = template
        self._text = TextEncoder(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._strips_right = {token.content for token in added.values() if token.rstrip}
        self._strips_left = {token.content for token in added.values() if token.lstrip}
        self._known: dict[tuple[str, bool], list[int]] = {}
        self._blocks: BlockEncoder | None = None
        if isinstance(template, ChatTemplate):
            tokens = [*template.special_tokens, template.bos_token]
            strips = not (self._strips_left | self._strips_right).isdisjoint(tokens)
            if not strips and BlockEncoder.supports(self._text, template):
                self._blocks = BlockEncoder(self._text, template)

    def encode(self, conversations: Iterable[Conversation]) -> list[EncodedExample]:
        """Rows of the conversations, in order; their text goes through the tokenizer as one batch.

        Raises:
            UserError: the template cannot write one of them.
        """
        return list(self.batch(conversations))

    def batch(self, conversations: Iterable[Conversation]) -> ExampleBatch:
        """The same rows, laid end to end. Several threads may call this at once.

        Raises:
            UserError: the template cannot write one of them.
        """
        if self._blocks is not None:
            return self._blocks.batch(conversations)
        return ExampleBatch.of(self._by_pieces(conversations))

    def _by_pieces(self, conversations: Iterable[Conversation]) -> list[EncodedExample]:
        """Rows by way of the template's pieces, which any template has."""
        plans = [self._plan(conversation) for conversation in conversations]
        encoded = iter(self._encode_chunks([item for plan in plans for item in plan.items if isinstance(item, _Chunk)]))
        rows = []
        for plan in plans:
            ids: list[int] = []
            codes = bytearray()
            for item in plan.items:
                if isinstance(item, _Chunk):
                    chunk_ids, chunk_codes = next(encoded)
                    ids += chunk_ids
                    codes += chunk_codes
                else:
                    ids.append(item[0])
                    codes.append(item[1])
            row_codes = np.frombuffer(bytes(codes), dtype=np.uint8)
            rows.append(EncodedExample(np.array(ids, dtype=np.int32), row_codes, plan.source, plan.lookalikes))
        return rows

    def _plan(self, conversation: Conversation) -> _Plan:
        contents = [message.content for message in conversation.messages]
        plan = _Plan(conversation.source, sum(self._text.lookalikes(contents)))
        texts: list[str] = []
        values: list[int] = []
        strip = False
        for piece in self._template.spans(conversation):
            if piece.special:
                if piece.text in self._strips_left:
                    self._strip_end(texts, values)
                self._close(plan, texts, values)
                texts, values = [], []
                plan.items.append((self._text.special[piece.text], piece.tag))
                strip = piece.text in self._strips_right
                continue
            text = piece.text.lstrip(self._text.whitespace) if strip else piece.text
            strip = strip and not text
            if text and values and values[-1] == piece.tag:
                texts[-1] += text
            elif text:
                texts.append(text)
                values.append(piece.tag)
        self._close(plan, texts, values)
        return plan

    @staticmethod
    def _close(plan: _Plan, texts: list[str], values: list[int]) -> None:
        if texts:
            plan.items.append(_Chunk(texts, values, first=not plan.items))

    def _strip_end(self, texts: list[str], values: list[int]) -> None:
        """Take the white space off the end, as a token with `lstrip` does."""
        while texts:
            texts[-1] = texts[-1].rstrip(self._text.whitespace)
            if texts[-1]:
                return
            texts.pop()
            values.pop()

    def _encode_chunks(self, chunks: Sequence[_Chunk]) -> list[_Encoded]:
        """Ids and codes of every chunk."""
        done: list[_Encoded] = [([], b"")] * len(chunks)
        for first in (False, True):
            whole, parted = [], []
            for index, chunk in enumerate(chunks):
                if chunk.first != first:
                    continue
                if len(chunk.texts) == 1 and not _is_content(chunk.values[0]):
                    ids = self._known_ids(chunk.texts[0], first=first)
                    done[index] = ids, bytes(chunk.values) * len(ids)
                elif len(chunk.texts) == 1 or self._head(chunk) is not None:
                    whole.append(index)
                else:
                    parted.append(index)
            encoded = self._text.encode(["".join(chunks[index].texts) for index in whole], first=first)
            for index, ids in zip(whole, encoded, strict=True):
                codes = self._codes(chunks[index], ids)
                if codes is None:
                    parted.append(index)
                else:
                    done[index] = ids, codes
            located = self._text.encode_parts([chunks[index].texts for index in parted], first=first)
            for index, tokens in zip(parted, located, strict=True):
                values = chunks[index].values
                done[index] = tokens.ids, bytes(_winner(values, start, stop) for start, stop in tokens.parts)
        return done

    def _known_ids(self, text: str, *, first: bool) -> list[int]:
        """Ids of text that comes from the template, not from a message, and so is encoded once for all."""
        key = (text, first)
        if key not in self._known:
            self._known[key] = self._text.encode([text], first=first)[0]
        return self._known[key]

    def _head(self, chunk: _Chunk) -> list[int] | None:
        """Ids of the template's text before a content, if they alone tell where it ends."""
        if len(chunk.texts) != 2 or _is_content(chunk.values[0]):
            return None
        ids = self._known_ids(chunk.texts[0], first=chunk.first)
        return ids if self._text.spells(ids) else None

    def _codes(self, chunk: _Chunk, ids: list[int]) -> bytes | None:
        """Codes of a chunk that is one stretch, or a head and a content; None if a token straddles the border."""
        head = [] if len(chunk.texts) == 1 else self._head(chunk)
        if head is None or ids[: len(head)] != head:
            return None
        return bytes(chunk.values[:1]) * len(head) + bytes(chunk.values[-1:]) * (len(ids) - len(head))


def _is_content(value: int) -> bool:
    return part_of(value) == TurnPart.CONTENT


def _winner(values: Sequence[int], first: int, last: int) -> int:
    """The code of a token that covers the stretches from `first` to `last`."""
    return values[first] if first == last else min(values[first : last + 1], key=precedence)
