"""The fast path for the templates of the registry, which tokenizes only header texts and contents.

The text between two special tokens is the end of a header and one content there. Everything else is known in advance.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.examples import ExampleBatch, TokenIds, TokenTags
from peftchat.chat_template.loss_mask import TurnPart, is_context, is_last_answer, precedence, token_tag
from peftchat.chat_template.message_text import TextParts, message_text
from peftchat.chat_template.templates import ChatTemplate
from peftchat.chat_template.text_encoder import TextEncoder
from peftchat.conversation import Conversation, Role


@dataclass(frozen=True, slots=True)
class _TurnFrame:
    """Ids and tags that all turns of one role have in common.

    Attributes:
        prefix_ids: ids in front of the header's text.
        header_text: the header's text, which is encoded together with the content.
        header_ids: ids of the header's text alone.
        suffix_ids: ids of the end token and of the trailer behind it.
        tags: tags of `prefix_ids`, of the header's text, of the content, and of each of `suffix_ids`.
        role: whose turns they are; None for what precedes all turns.
    """

    prefix_ids: list[int]
    header_text: str
    header_ids: list[int]
    suffix_ids: list[int]
    tags: bytes
    role: Role | None = None


class BlockEncoder:
    """Encodes conversations with a `ChatTemplate`, tokenizing only header texts and contents.

    Args:
        text: encodes ordinary text.
        template: a template that `supports` accepts.
    """

    def __init__(self, text: TextEncoder, template: ChatTemplate) -> None:
        self._text = text
        self._template = template
        self._bos: _TurnFrame | None = None
        if template.bos_token is not None:
            tag = token_tag(TurnPart.OUTSIDE)
            self._bos = _TurnFrame([text.special[template.bos_token]], "", [], [], bytes([tag, tag, tag]))
        self._frames = {
            (role, last, context): self._frame(role, last, context)
            for role in template.headers
            for last in (False, True)
            for context in (False, True)
        }

    @staticmethod
    def supports(text: TextEncoder, template: ChatTemplate) -> bool:
        """Return whether every header is special tokens and then one text whose ids show where it ends."""
        return all(
            len(header) > 1
            and all(special for _, special in header[:-1])
            and not header[-1][1]
            and text.is_prefix_stable(text.encode([header[-1][0]])[0])
            for header in map(template.header_spans, template.headers)
        )

    def _frame(self, role: Role, last_answer: bool, context: bool) -> _TurnFrame:
        *specials, (header_text, _) = self._template.header_spans(role)
        header_ids, trailer_ids = self._text.encode([header_text, self._template.trailer])
        parts = [TurnPart.HEADER, TurnPart.HEADER, TurnPart.CONTENT, TurnPart.END]
        parts += [TurnPart.TRAILER] * len(trailer_ids)
        return _TurnFrame(
            [self._text.special[token] for token, _ in specials],
            header_text,
            header_ids,
            [self._text.special[self._template.end_token], *trailer_ids],
            bytes(token_tag(part, role, last_answer=last_answer, context=context) for part in parts),
            role,
        )

    def batch(self, conversations: Iterable[Conversation]) -> ExampleBatch:
        """Return the examples of the conversations, in order.

        Raises:
            UserError: the template cannot write one of them.
        """
        frames: list[_TurnFrame] = []
        contents: list[str] = []
        turn_ends: list[int] = []
        sources: list[str] = []
        messages: list[str] = []
        message_ends: list[int] = []
        divided: dict[int, TextParts] = {}
        for conversation in conversations:
            messages += record_texts(conversation)
            message_ends.append(len(messages))
            if self._bos is not None:
                frames.append(self._bos)
                contents.append("")
            for role, content, last_answer, context, parts in self._template.turns(conversation):
                if parts:
                    divided[len(frames)] = parts
                frames.append(self._frames[role, last_answer, context])
                contents.append(content)
            turn_ends.append(len(frames))
            sources.append(conversation.source)
        encoded = self._text.encode([frame.header_text + text for frame, text in zip(frames, contents, strict=True)])
        straddled = self._straddled(frames, contents, encoded)
        tags_by_turn = self._tag_straddled(frames, contents, straddled) | self._tag_parts(frames, encoded, divided)
        ids, tags, starts = _concatenate(frames, encoded, tags_by_turn)
        totals = np.cumsum([0, *self._text.count_special_token_text(messages)])
        special_token_text = np.diff(totals[[0, *message_ends]]).astype(np.int32)
        return ExampleBatch(ids, tags, starts[[0, *turn_ends]], sources, special_token_text)

    def _straddled(self, frames: Sequence[_TurnFrame], contents: Sequence[str], encoded: list[list[int]]) -> list[int]:
        """Return the turns with a token that spans header and content, after the answers among them were mended.

        A model sees the header of an answer and writes the content, so that no token may span the two there.
        """
        straddled = [
            index
            for index, (frame, ids) in enumerate(zip(frames, encoded, strict=True))
            if ids[: len(frame.header_ids)] != frame.header_ids
        ]
        if not straddled:
            return []
        answers = [index for index in straddled if frames[index].role == "assistant"]
        for index, ids in zip(answers, self._text.encode_behind([contents[index] for index in answers]), strict=True):
            encoded[index] = frames[index].header_ids + ids
        return [index for index in straddled if frames[index].role != "assistant"]

    def _tag_straddled(
        self, frames: Sequence[_TurnFrame], contents: Sequence[str], straddled: Sequence[int]
    ) -> dict[int, bytes]:
        """Return, for each turn with a token that spans header and content, the tags of the ids of the two."""
        located = self._text.encode_spans([(frames[index].header_text, contents[index]) for index in straddled])
        tags: dict[int, bytes] = {}
        for index, tokens in zip(straddled, located, strict=True):
            span_tags = frames[index].tags[1:3]
            shared = min(span_tags, key=precedence)
            tags[index] = bytes(span_tags[first] if first == last else shared for first, last in tokens.spans)
        return tags

    def _tag_parts(
        self, frames: Sequence[_TurnFrame], encoded: Sequence[list[int]], divided: Mapping[int, TextParts]
    ) -> dict[int, bytes]:
        """Return, for each answer with several parts, the tags of the ids of its header's text and its parts."""
        pieces = [tuple(text for text, _ in parts) for parts in divided.values()]
        inner = self._text.encode_spans([(frames[i].header_text, *p) for i, p in zip(divided, pieces, strict=True)])
        tags: dict[int, bytes] = {}
        for (index, parts), own, tokens in zip(divided.items(), pieces, inner, strict=True):
            frame = frames[index]
            last, context = is_last_answer(frame.tags[1]), is_context(frame.tags[1])
            span_tags = [token_tag(part, frame.role, last_answer=last, context=context) for _, part in parts]
            if tokens.ids == encoded[index]:
                tags[index] = bytes(tag_of([frame.tags[1], *span_tags], *covered) for covered in tokens.spans)
                continue
            # A token would span header and answer, so that the answer was encoded apart.
            (behind,) = self._text.encode_spans_behind([own])
            own_tags = bytes(tag_of(span_tags, *covered) for covered in behind.spans)
            tags[index] = frame.tags[1:2] * len(frame.header_ids) + own_tags
        return tags


def record_texts(conversation: Conversation) -> list[str]:
    """Return the texts that come from the record."""
    texts = [message_text(message) for message in conversation.messages]
    return texts if conversation.tools is None else [*texts, conversation.tools]


def _concatenate(
    frames: Sequence[_TurnFrame], encoded: Sequence[list[int]], straddled: Mapping[int, bytes]
) -> tuple[TokenIds, TokenTags, npt.NDArray[np.int64]]:
    """Return ids and tags of all turns, one after the other, and the index at which each turn starts.

    Args:
        frames: the ids around each content.
        encoded: ids of each header's text and content.
        straddled: tags of those ids for turns where they do not follow from the header's length.
    """
    ids: list[int] = []
    tags = bytearray()  # each to be repeated as often as `counts` says
    counts: list[int] = []
    lengths: list[int] = []
    for index, (frame, middle) in enumerate(zip(frames, encoded, strict=True)):
        ids += frame.prefix_ids
        ids += middle
        ids += frame.suffix_ids
        header_length = len(frame.header_ids)
        if index in straddled:
            tags += frame.tags[:1] + straddled[index] + frame.tags[3:]
            counts += (len(frame.prefix_ids), *[1] * (len(middle) + len(frame.suffix_ids)))
        else:
            tags += frame.tags
            counts += (len(frame.prefix_ids), header_length, len(middle) - header_length, *[1] * len(frame.suffix_ids))
        lengths.append(len(frame.prefix_ids) + len(middle) + len(frame.suffix_ids))
    token_tags = np.repeat(np.frombuffer(tags, dtype=np.uint8), counts)
    return np.array(ids, dtype=np.int32), token_tags, np.cumsum([0, *lengths], dtype=np.int64)


def tag_of(tags: Sequence[int], first: int, last: int) -> int:
    """Return the tag of a token that covers the spans from `first` to `last`."""
    return tags[first] if first == last else min(tags[first : last + 1], key=precedence)
