"""Encoding: conversations to token ids and token tags, with one tokenizer and one chat template.

`ChatEncoder` takes any template's spans. Templates of the registry have a fast path (`BlockEncoder`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from peftchat.chat_template.block_encoder import BlockEncoder, record_texts, tag_of
from peftchat.chat_template.examples import EncodedExample, ExampleBatch
from peftchat.chat_template.loss_mask import TurnPart, part_of
from peftchat.chat_template.templates import ChatTemplate, TemplateSpan
from peftchat.chat_template.text_encoder import TextEncoder
from peftchat.conversation import Conversation, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Place = Literal["inside", "start", "behind"]
"""Where text stands: behind a special token, at the start of the sequence, or behind other text."""

_PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(slots=True)
class _TextRun:
    """Ordinary text between two special tokens, in spans of one tag each.

    Attributes:
        texts: the spans' texts.
        tags: their tags. Neighbors differ.
        place: where it stands.
    """

    texts: list[str]
    tags: list[int]
    place: Place


@dataclass(slots=True)
class _Prepared:
    """A conversation before its text is encoded.

    Attributes:
        source: where it came from, `file:line`.
        special_token_text: occurrences of text in its messages that is spelled like a special token.
        items: special tokens as (id, tag), and the text between them.
    """

    source: str
    special_token_text: int
    items: list[tuple[int, int] | _TextRun] = field(default_factory=list)


_EncodedRun = tuple[list[int], bytes]
"""Ids of a run of text and their tags."""


class Template(Protocol):
    """The part of a chat template that encoding needs."""

    @property
    def missing_roles(self) -> frozenset[Role]:
        """The roles that it cannot write, where the recipe says what to do with them."""
        ...

    def examples(self, conversation: Conversation) -> Sequence[Iterable[TemplateSpan]]:
        """Return the conversation's examples, each as spans of text."""
        ...

    def examples_of(self, conversations: Sequence[Conversation]) -> Sequence[Sequence[Iterable[TemplateSpan]]]:
        """Return the examples of each conversation."""
        ...


class ChatEncoder:
    """Encodes conversations with one tokenizer and one chat template.

    The ids equal those of `apply_chat_template(tokenize=True)` on conversations whose messages hold no text that is
    spelled like a special token. Such text is encoded as ordinary text here.

    Args:
        tokenizer: a tokenizer that has the template's tokens (`peftchat.chat_template.chat_format.make_format`).
        template: the template.
        text: the tokenizer's encoder of text; None to make one, which copies the tokenizer.

    Attributes:
        parallel: whether the tokenizer lets other threads run while it works.
        missing_roles: the roles that the template cannot write and that the recipe says what to do with.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, text: TextEncoder | None = None
    ) -> None:
        self.parallel = tokenizer.is_fast
        self.missing_roles = template.missing_roles
        self._template = template
        self._text = text or TextEncoder(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._strips_right = {token.content for token in added.values() if token.rstrip}
        self._strips_left = {token.content for token in added.values() if token.lstrip}
        self._template_ids: dict[tuple[str, Place], list[int]] = {}
        self._blocks: BlockEncoder | None = None
        if isinstance(template, ChatTemplate):
            tokens = [*template.special_tokens, template.bos_token]
            strips = not (self._strips_left | self._strips_right).isdisjoint(tokens)
            if not strips and BlockEncoder.supports(self._text, template):
                self._blocks = BlockEncoder(self._text, template)

    @property
    def renders(self) -> bool:
        """Whether the template is rendered, which takes more of the time than the tokenizer."""
        return self._blocks is None

    def encode(self, conversations: Iterable[Conversation]) -> list[EncodedExample]:
        """Return the examples of the conversations, in order. The tokenizer gets their text as one batch.

        A template that rewrites earlier turns makes several examples of one conversation.

        Raises:
            UserError: the template cannot write one of them.
        """
        return list(self.batch(conversations))

    def batch(self, conversations: Iterable[Conversation]) -> ExampleBatch:
        """Return the same examples as one flat batch. Several threads may call this at once.

        Raises:
            UserError: the template cannot write one of them.
        """
        if self._blocks is not None:
            return self._blocks.batch(conversations)
        conversations = list(conversations)
        spans = self._template.examples_of(conversations)
        owners = [number for number, examples in enumerate(spans) for _ in examples]
        prepared = [
            self._prepare(conversation, example, count)
            for conversation, examples in zip(conversations, spans, strict=True)
            for count in [sum(self._text.count_special_token_text(record_texts(conversation)))]
            for example in examples
        ]
        return ExampleBatch.of(self._encode_prepared(prepared), owners)

    def encode_spans(self, spans: Iterable[TemplateSpan]) -> list[int]:
        """Return the ids of one text in spans, such as a prompt."""
        (example,) = self._encode_prepared([self._prepare(Conversation(()), spans)])
        ids: list[int] = example.ids.tolist()
        return ids

    def _encode_prepared(self, prepared: Sequence[_Prepared]) -> list[EncodedExample]:
        """Return the examples by way of their spans, which every template has."""
        runs = [item for one in prepared for item in one.items if isinstance(item, _TextRun)]
        encoded = iter(self._encode_runs(runs))
        examples = []
        for one in prepared:
            ids: list[int] = []
            tags = bytearray()
            for item in one.items:
                if isinstance(item, _TextRun):
                    run_ids, run_tags = next(encoded)
                    ids += run_ids
                    tags += run_tags
                else:
                    ids.append(item[0])
                    tags.append(item[1])
            token_tags = np.frombuffer(bytes(tags), dtype=np.uint8)
            examples.append(
                EncodedExample(np.array(ids, dtype=np.int32), token_tags, one.source, one.special_token_text)
            )
        return examples

    def _prepare(self, conversation: Conversation, spans: Iterable[TemplateSpan], count: int = 0) -> _Prepared:
        """Return an example as special tokens and runs of text, without the white space that tokens strip.

        Args:
            conversation: of the example.
            spans: the example.
            count: how often a text of the conversation is spelled like a special token.
        """
        prepared = _Prepared(conversation.source, count)
        texts: list[str] = []
        tags: list[int] = []
        strips = False
        for span in spans:
            if span.opens:
                self._append_run(prepared, texts, tags)
                texts, tags, strips = [], [], False
            if span.special:
                if span.text in self._strips_left:
                    self._strip_end(texts, tags)
                self._append_run(prepared, texts, tags)
                texts, tags = [], []
                prepared.items.append((self._text.special[span.text], span.tag))
                strips = span.text in self._strips_right
                continue
            text = span.text.lstrip(self._text.whitespace) if strips else span.text
            strips = strips and not text
            if text and tags and tags[-1] == span.tag:
                texts[-1] += text
            elif text:
                texts.append(text)
                tags.append(span.tag)
        self._append_run(prepared, texts, tags)
        return prepared

    @staticmethod
    def _append_run(prepared: _Prepared, texts: list[str], tags: list[int]) -> None:
        if texts:
            items = prepared.items
            place: Place = "start" if not items else "behind" if isinstance(items[-1], _TextRun) else "inside"
            items.append(_TextRun(texts, tags, place))

    def _strip_end(self, texts: list[str], tags: list[int]) -> None:
        """Remove the white space at the end, as a token with `lstrip` does."""
        while texts:
            texts[-1] = texts[-1].rstrip(self._text.whitespace)
            if texts[-1]:
                return
            texts.pop()
            tags.pop()

    def _encode_runs(self, runs: Sequence[_TextRun]) -> list[_EncodedRun]:
        """Return ids and tags of every run."""
        done: list[_EncodedRun] = [([], b"")] * len(runs)
        for place in _PLACES:
            joined: dict[int, list[int]] = {}
            by_spans = []
            for index, run in enumerate(runs):
                if run.place != place:
                    continue
                texts = run.texts
                if len(texts) == 1:
                    if _IS_CONTENT[run.tags[0]] or len(texts[0]) > _LONGEST_KEPT:
                        joined[index] = []
                    else:
                        ids = self._ids_of_template_text(texts[0], place)
                        done[index] = ids, bytes(run.tags) * len(ids)
                elif (header := self._header_ids(run)) is not None:
                    joined[index] = header
                else:
                    by_spans.append(index)
            # Examples of one conversation repeat what precedes their answers.
            whole = {index: "".join(runs[index].texts) for index in joined}
            distinct = list(dict.fromkeys(whole.values()))
            encoded = dict(zip(distinct, self._encode_texts(distinct, place), strict=True))
            for index, header in joined.items():
                ids, tags = encoded[whole[index]], runs[index].tags
                if ids[: len(header)] == header:
                    done[index] = ids, bytes(tags[:1]) * len(header) + bytes(tags[-1:]) * (len(ids) - len(header))
                else:
                    by_spans.append(index)
            spans = list(dict.fromkeys(tuple(runs[index].texts) for index in by_spans))
            behind = place == "behind"
            located = (
                self._text.encode_spans_behind(spans)
                if behind
                else self._text.encode_spans(spans, at_start=place == "start")
            )
            by_text = dict(zip(spans, located, strict=True))
            for index in by_spans:
                span_tags, tokens = runs[index].tags, by_text[tuple(runs[index].texts)]
                tag_by_spans = {pair: tag_of(span_tags, *pair) for pair in set(tokens.spans)}
                done[index] = tokens.ids, bytes(map(tag_by_spans.__getitem__, tokens.spans))
        return done

    def _encode_texts(self, texts: Sequence[str], place: Place) -> list[list[int]]:
        return (
            self._text.encode_behind(texts)
            if place == "behind"
            else self._text.encode(texts, at_start=place == "start")
        )

    def _ids_of_template_text(self, text: str, place: Place) -> list[int]:
        """Return ids of text that comes from the template and not from a message. Each is encoded once."""
        key = (text, place)
        if key not in self._template_ids:
            self._template_ids[key] = self._encode_texts([text], place)[0]
        return self._template_ids[key]

    def _header_ids(self, run: _TextRun) -> list[int] | None:
        """Return ids of the template's text before a content, if they show where that text ends."""
        header = run.texts[0]
        if len(run.texts) != 2 or _IS_CONTENT[run.tags[0]] or len(header) > _LONGEST_KEPT:
            return None
        ids = self._ids_of_template_text(header, run.place)
        return ids if self._text.is_prefix_stable(ids) else None


_LONGEST_KEPT = 256
"""Characters of the template's text of which the ids are kept. Longer text has definitions of tools, which differ."""

_IS_CONTENT = tuple(part_of(tag) in (TurnPart.CONTENT, TurnPart.REASONING, TurnPart.TOOL_CALL) for tag in range(256))
"""For each tag, whether its text comes from a message. Of that there is too much to keep the ids."""
