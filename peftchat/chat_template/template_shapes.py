"""Examples of conversations by their shape: what a template writes for the same turns with marks as contents.

Rendering answer by answer costs several renderings each. Conversations with the same roles, the same tools and calls of
the same functions differ in their contents, reasoning, arguments and ids only. So the renderings of one of them, with a
mark in the place of each, serve all others: the texts are put in. That holds where the template does nothing with such
a text but write it. `content_conditions` finds in its source what it asks of texts; a conversation that has such text
is rendered answer by answer. Beyond that, the whole conversation is rendered once, and must equal what was put
together.
"""

import itertools
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftchat.chat_template.answer_rendering import RenderedAnswer
from peftchat.chat_template.answer_spans import ExampleBuilder
from peftchat.chat_template.content_conditions import ContentConditions
from peftchat.chat_template.templates import TemplateSpan
from peftchat.conversation import Conversation, Message, ToolCall

_SHAPES, _TOOL_SHAPES = 4096, 256
"""The most shapes that are remembered: all, and those with tools, whose text is long."""

_OWN_MARKS = re.compile(r"</?[\w:]*think\w*>|\[/?THINK\]|<tool_call>")
"""Reasoning and calls in a content, whose parts are kinds of text of their own."""


@dataclass(frozen=True, slots=True)
class FilledText:
    """A text of a template with texts of a conversation in it: pieces, and between them the numbers of the texts."""

    pieces: tuple[str, ...]
    numbers: tuple[int, ...]

    def fill(self, texts: Sequence[str]) -> str:
        """Return the text with those of a conversation (`texts_of`)."""
        if not self.numbers:
            return self.pieces[0]
        found = [self.pieces[0]]
        for number, piece in zip(self.numbers, self.pieces[1:], strict=True):
            found.append(texts[number])
            found.append(piece)
        return "".join(found)


@dataclass(slots=True)
class Shape:
    """What a template writes for conversations with the same turns.

    Attributes:
        whole: the conversation.
        answers: the trained answers, with marks as contents.
        borders: for each answer but the last, the text on both sides of the border between prompt and answer; None
            where the next prompt does not begin with them.
        builder: builds the spans, with marks as contents.
        examples: spans by which answers begin a new example, each with its text if that holds contents.
    """

    whole: FilledText
    answers: Sequence[RenderedAnswer]
    borders: Sequence[tuple[FilledText, FilledText] | None]
    builder: ExampleBuilder
    examples: dict[tuple[bool, ...], list[list[tuple[TemplateSpan, FilledText | None]]]] = field(default_factory=dict)


class NoShapeError(Exception):
    """The template does more with a text than write it."""


class Marks:
    """Texts that stand for those of a conversation, and can be found in a rendering."""

    def __init__(self) -> None:
        self._nonce = nonce = secrets.token_hex(6)
        # Arguments are found as the JSON of an object with one mark in it.
        self._arguments = re.compile(rf'\{{"x{nonce}k\d+x": "x{nonce}v(\d+)x"\}}')
        self._pattern = re.compile(rf"x{nonce}m(\d+)x")

    def conversation(self, conversation: Conversation) -> Conversation:
        """Return the conversation with a mark in the place of each text of `texts_of`."""
        numbers = itertools.count()
        ids = _Numbers()
        messages = []
        for message in conversation.messages:
            content = self._mark(next(numbers))
            reasoning = None if message.reasoning is None else self._mark(next(numbers))
            calls = [(call, next(numbers)) for call in message.tool_calls]
            messages.append((message, content if message.content else "", reasoning, calls))
        first_id = next(numbers)

        def id_mark(value: str | None) -> str | None:
            return None if value is None else self._mark(first_id + ids[value])

        return Conversation(
            tuple(
                message._replace(
                    content=content,
                    reasoning=reasoning,
                    tool_calls=tuple(
                        ToolCall(call.name, self._object(number), id_mark(call.id)) for call, number in calls
                    ),
                    tool_call_id=id_mark(message.tool_call_id),
                )
                for message, content, reasoning, calls in messages
            ),
            tools=conversation.tools,
        )

    def _mark(self, number: int) -> str:
        return f"x{self._nonce}m{number}x"

    def _object(self, number: int) -> str:
        return f'{{"x{self._nonce}k{number}x": "x{self._nonce}v{number}x"}}'

    def text(self, rendered: str) -> FilledText:
        """Return a rendering with marks as pieces and numbers of texts.

        Raises:
            NoShapeError: a mark is not there as it was given.
        """
        parts = self._pattern.split(self._arguments.sub(lambda match: self._mark(int(match[1])), rendered))
        if any(self._nonce in piece for piece in parts[::2]):
            raise NoShapeError
        return FilledText(tuple(parts[::2]), tuple(map(int, parts[1::2])))


class _Numbers(dict[str, int]):
    """The number of each id of a conversation, in the order in which they are met."""

    def __missing__(self, value: str) -> int:
        self[value] = len(self)
        return self[value]


def texts_of(conversation: Conversation) -> list[str]:
    """Return the texts in which conversations of one shape differ: contents, reasoning, arguments as JSON, and ids."""
    texts: list[str] = []
    for message in conversation.messages:
        texts.append(message.content)
        if message.reasoning is not None:
            texts.append(message.reasoning)
        for call in message.tool_calls:
            # As the `tojson` of transformers writes them.
            texts.append(json.dumps(call.parsed(), ensure_ascii=False))
    return [*texts, *dict.fromkeys(_ids_of(conversation.messages))]


def _ids_of(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        for call in message.tool_calls:
            if call.id is not None:
                yield call.id
        if message.tool_call_id is not None:
            yield message.tool_call_id


ShapeKey = tuple[Any, ...]


def shape_key(conversation: Conversation, conditions: ContentConditions, special: re.Pattern[str]) -> ShapeKey | None:
    """Return what conversations of one shape have in common; None for one that has to be rendered answer by answer."""
    seen: set[str] = set()
    texts = 0
    key: list[Any] = [conversation.tools]
    if conversation.tools is not None and special.search(conversation.tools):
        return None
    ids = _Numbers()
    for message in conversation.messages:
        content, reasoning = message.content, message.reasoning
        answers = message.role == "assistant"
        if content or not message.tool_calls:
            if _asked_for(content, conditions, special, inline=answers):
                return None
            seen.add(content)
            texts += 1
        if message.is_plain:
            key.append(message.role)
            continue
        if content != content.strip() or (reasoning is not None and reasoning != reasoning.strip()):
            return None  # white space there may belong to either side
        if reasoning is not None:
            if not answers or _asked_for(reasoning, conditions, special, inline=True):
                return None
            seen.add(reasoning)
            texts += 1
        calls = []
        for call in message.tool_calls:
            arguments = call.parsed()
            if not (answers and conditions.calls and isinstance(arguments, dict) and arguments):
                return None
            texts_of_call = (call.arguments, call.name, call.id or "")
            if any(special.search(text) or conditions.parts.search(text) for text in texts_of_call):
                return None
            calls.append((call.name, None if call.id is None else ids[call.id]))
        result = None if message.tool_call_id is None else ids[message.tool_call_id]
        if special.search(message.tool_call_id or "") or special.search(message.name or ""):
            return None
        key.append((message.role, message.train is False, bool(content), reasoning is not None, tuple(calls), result,
                    message.name))  # fmt: skip
    return tuple(key) if len(seen) == texts else None


def _asked_for(text: str, conditions: ContentConditions, special: re.Pattern[str], *, inline: bool) -> bool:
    """Return whether a template, or the search for kinds of text, may treat a text in a way of its own."""
    if conditions.met_by(text) or special.search(text):
        return True
    return inline and _OWN_MARKS.search(text) is not None


class ShapeCache:
    """The shapes that were met, by their key. A shape is made when it is met for the second time."""

    def __init__(self) -> None:
        self._met: dict[ShapeKey, Shape | None] = {}
        self._once: set[int] = set()
        self._with_tools = 0

    def get(self, key: ShapeKey, make: Any) -> Shape | None:
        """Return the shape of a key; None where there is none yet, or none can be made."""
        if key in self._met:
            return self._met[key]
        seldom = hash(key)
        full = len(self._met) >= _SHAPES or (key[0] is not None and self._with_tools >= _TOOL_SHAPES)
        if seldom not in self._once or full:
            if len(self._once) < _SHAPES:
                self._once.add(seldom)
            return None
        self._with_tools += key[0] is not None
        self._met[key] = made = make()
        return made
