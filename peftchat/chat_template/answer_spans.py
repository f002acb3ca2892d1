"""From rendered answers to the spans of an example: what each stretch of text is.

An example is the prompt of an answer and the answer, and goes on through later answers as long as their prompts begin
with what is there already. Only answers are found exactly: they follow from the rendering. The tags of the text around
them say whose turn it is, for reports and for `chat.loss_on: everything`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.answer_rendering import RenderedAnswer
from peftchat.chat_template.loss_mask import TurnPart, token_tag
from peftchat.chat_template.message_text import content_parts
from peftchat.chat_template.template_renderer import TemplateMessage, TemplateRenderer
from peftchat.chat_template.templates import TemplateSpan

if TYPE_CHECKING:
    from peftchat.conversation import Role

_REASONING_END = re.compile(r"</[\w:]*think\w*>|\[/THINK\]")

_OPENED = re.compile(r"(?:<[\w:]*think\w*>|\[THINK\])\s*\Z")
_EMPTY_REASONING = re.compile(
    r"\s*(?:(?:<(?P<tag>[\w:]*think\w*)>)?\s*</[\w:]*think\w*>"
    r"|<\|START_THINKING\|>\s*<\|END_THINKING\|>"
    r"|\[THINK\]\s*\[/THINK\]"
    r"|<\|channel>thought\s*<channel\|>)\s*"
)

_LONGEST = 64
"""Characters of the longest special token."""


@dataclass(frozen=True, slots=True)
class ExampleBuilder:
    """Builds the spans of one conversation's examples.

    Attributes:
        renderer: rendered the answers; it puts protected text back.
        messages: the conversation, protected.
        untrained: the messages that must not be trained (`Message.train` is False).
        last_answer: index of the last assistant message; -1 without one.
        headers: what the template writes in front of a content of each role, as far as it is known.
        has_tools: whether the conversation defines tools, which templates write as text of the system message.
    """

    renderer: TemplateRenderer
    messages: Sequence[TemplateMessage]
    untrained: frozenset[int]
    last_answer: int
    headers: Mapping[str, str] = field(default_factory=dict)
    has_tools: bool = False

    def spans(self, answers: Sequence[RenderedAnswer], *, repeated: bool) -> Iterator[TemplateSpan]:
        """Yield the spans of an example with these answers, each of which continues the one before.

        Args:
            answers: at least one.
            repeated: whether an earlier example trains what precedes the first prompt's opening.
        """
        done, first = 0, 0
        for answer in answers:
            closed = len(answer.prompt) - answer.opening
            indices = range(first, answer.index)
            yield from self._context(answer.prompt[done:closed], indices, repeated=repeated)
            header = self._tag(TurnPart.HEADER, answer.index)
            yield from self._template_text(answer.prompt[max(done, closed) :], header)
            yield from self._answer(answer)
            done, first, repeated = len(answer.prompt) + len(answer.text), answer.index + 1, False
        yield from self._template_text(answers[-1].trailer, self._tag(TurnPart.TRAILER, answers[-1].index))

    def context_only(self, rendered: str) -> Iterator[TemplateSpan]:
        """Yield the spans of a conversation without a trained answer."""
        yield from self._context(rendered, range(len(self.messages)), repeated=True)

    def _answer(self, answer: RenderedAnswer) -> Iterator[TemplateSpan]:
        """Yield an answer: what precedes its content, the content, its calls and the token that ends it."""
        opens = True
        for piece, part in self._answer_parts(answer):
            for span in self._template_text(piece, self._tag(part, answer.index)):
                yield TemplateSpan(span.text, span.tag, span.special, opens)
                opens = False

    def _answer_parts(self, answer: RenderedAnswer) -> Iterator[tuple[str, TurnPart]]:
        """Yield an answer's text in pieces, each with the part of the turn that it is."""
        message, text = self.messages[answer.index], answer.text
        end = self._end_of_text(text)
        reasoned = self._end_of_reasoning(answer, end)
        content = str(message.get("content") or "").strip()
        start = _find_outside(self.renderer.special, text, content, reasoned, backwards=True) if content else -1
        calls = message.get("tool_calls")
        if start >= 0:
            stop = min(start + len(content), end)
        elif calls:
            start = stop = min(max(len(_before_calls(text, calls)), reasoned), end)
        else:
            # Without a content nothing but reasoning precedes the end; or the template takes the content apart.
            start, stop = (reasoned, end) if content else (end, end)
        yield text[:reasoned], TurnPart.REASONING
        yield from _preamble(text[reasoned:start])
        yield from content_parts(text[start:stop])
        yield text[stop:end], TurnPart.TOOL_CALL if calls else TurnPart.END
        yield text[end:], TurnPart.END

    def _end_of_text(self, text: str) -> int:
        """Return where the special tokens at the end of a text begin."""
        end = len(text)
        for match in reversed(list(self.renderer.special.finditer(text))):
            if match.end() != end:
                break
            end = match.start()
        return end

    def _end_of_reasoning(self, answer: RenderedAnswer, end: int) -> int:
        """Return where an answer's reasoning ends, with the mark behind it; 0 for an answer without.

        Args:
            answer: the answer.
            end: where the tokens that end the turn begin.
        """
        message, text = self.messages[answer.index], answer.text
        reasoning = str(message.get("reasoning_content") or "").strip()
        special = self.renderer.special
        if reasoning:
            start = _find_outside(special, text, reasoning)
            if start >= 0:
                behind = start + len(reasoning)
                mark = re.compile(rf"\s*(?:{_REASONING_END.pattern}|{special.pattern})\s*|\s*").match(text, behind, end)
                return behind if mark is None else mark.end()
        # The prompt may open a reasoning that the content, or the template, only closes.
        opened = _OPENED.search(answer.prompt[len(answer.prompt) - answer.opening :])
        if reasoning or opened:
            close = _REASONING_END.search(text, 0, end)
            if close is not None and (reasoning or text[: close.start()].strip()):
                return close.end() + len(text[close.end() : end]) - len(text[close.end() : end].lstrip())
        return 0

    def _context(self, text: str, indices: range, *, repeated: bool) -> Iterator[TemplateSpan]:
        """Yield text before an answer, tagged by the messages whose contents stand in it."""
        at = 0
        previous: int | None = None
        if indices.start:
            # The turn of the answer before has ended; white space may follow it.
            at = len(text) - len(text.lstrip())
            yield from self._template_text(text[:at], self._tag(TurnPart.TRAILER, indices.start - 1, repeated))
        for index in indices:
            found = _find_content(self.renderer.special, self.messages[index], text, at)
            if found is None:
                continue
            yield from self._between(text[at : found.start], previous, index, repeated)
            tag = self._context_tag(TurnPart.CONTENT, index, repeated)
            yield from self._template_text(text[found.start : found.stop], tag)
            at, previous = found.stop, index
        yield from self._between(text[at:], previous, None, repeated)

    def _between(self, text: str, before: int | None, after: int | None, repeated: bool) -> Iterator[TemplateSpan]:
        """Yield the text between two contents: the end of one turn and the header of the next."""
        header = "" if after is None else self.headers.get(self.messages[after]["role"], "")
        own = text[: len(text) - len(header)] if header and text.endswith(header) else ""
        if before is None and own:
            yield from self._in_front(own, repeated)
            text = text[len(own) :]
        elif before is not None and self.has_tools and self.messages[before]["role"] == "system" and own:
            # Definitions of tools stand behind the system message, in its turn.
            close = re.compile(rf"{self.renderer.special.pattern}+\s*\Z").search(own)
            stop = close.start() if close else len(own)
            yield from self._template_text(own[:stop], self._context_tag(TurnPart.CONTENT, before, repeated))
            text = text[stop:]
        end = 0
        if before is not None:
            match = re.compile(rf"[^\S\n]*{self.renderer.special.pattern}+|").match(text)
            end = match.end() if match else 0
            yield from self._template_text(text[:end], self._context_tag(TurnPart.END, before, repeated))
            trailer = len(text) - len(text[end:].lstrip()) if text[end:].strip() else len(text)
            yield from self._template_text(text[end:trailer], self._context_tag(TurnPart.TRAILER, before, repeated))
            end = trailer
        tag = token_tag(TurnPart.OUTSIDE, context=repeated)
        if after is not None:
            tag = self._context_tag(TurnPart.HEADER, after, repeated)
        yield from self._template_text(text[end:], tag)

    def _in_front(self, text: str, repeated: bool) -> Iterator[TemplateSpan]:
        """Yield the template's own text in front of all turns, such as a system prompt by default."""
        outside = token_tag(TurnPart.OUTSIDE, context=repeated)
        bos = self.renderer.bos_token
        start = len(bos) if bos and text.startswith(bos) else 0
        yield from self._template_text(text[:start], outside)
        system = token_tag(TurnPart.CONTENT, "system", context=repeated)
        yield from self._template_text(text[start:], system if self.has_tools else outside)

    def _context_tag(self, part: TurnPart, index: int, repeated: bool) -> int:
        """Return the tag of text in a prompt: an answer there is trained elsewhere, or not at all."""
        return self._tag(part, index, repeated or self.messages[index]["role"] == "assistant")

    def _tag(self, part: TurnPart, index: int, context: bool = False) -> int:
        role: Role = self.messages[index]["role"]
        last = index == self.last_answer
        return token_tag(part, role, last_answer=last, context=context or index in self.untrained)

    def _template_text(self, text: str, tag: int) -> Iterator[TemplateSpan]:
        """Yield text with each special token of the template as a span of its own, protected text put back."""
        for number, part in enumerate(self.renderer.special.split(text)):
            if part:
                special = number % 2 == 1
                yield TemplateSpan(part if special else self.renderer.restore(part), tag, special)


def _preamble(text: str) -> Iterator[tuple[str, TurnPart]]:
    """Yield the text between prompt and content in pieces: an empty reasoning, and other text of the template."""
    empty = _EMPTY_REASONING.search(text)
    if empty is None:
        yield text, TurnPart.PREAMBLE
        return
    yield text[: empty.start()], TurnPart.PREAMBLE
    yield empty.group(), TurnPart.EMPTY_REASONING
    yield text[empty.end() :], TurnPart.PREAMBLE


def _find_content(special: re.Pattern[str], message: TemplateMessage, text: str, at: int) -> range | None:
    """Return where a message's content and calls stand in a text; None if they are not there as they are."""
    content = str(message.get("content") or "").strip()
    for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]):
        start = _find_outside(special, text, form, at) if form else -1
        if start >= 0:
            return range(start, start + len(form))
    for call in message.get("tool_calls") or ():
        name = str(call["function"]["name"])
        start = _find_outside(special, text, name, at)
        if start >= 0:
            return range(start, start + len(name))
    return None


def _find_outside(special: re.Pattern[str], text: str, value: str, at: int = 0, *, backwards: bool = False) -> int:
    """Return where a value stands in a text, not within a special token; -1 if nowhere.

    Args:
        special: matches special tokens; the value holds none.
        text: searched from `at` on.
        value: what to find.
        at: the first character to consider.
        backwards: whether to return the last place instead of the first.
    """
    stop = len(text)
    while True:
        start = text.rfind(value, at, stop) if backwards else text.find(value, at)
        if start < 0:
            return -1
        around = special.finditer(text, max(at, start - _LONGEST), start + len(value) + _LONGEST)
        token = next((one for one in around if one.start() < start + len(value) and one.end() > start), None)
        if token is None:
            return start
        at, stop = (at, token.start()) if backwards else (token.end(), stop)


def _before_calls(text: str, calls: Sequence[Any]) -> str:
    """Return the text before the line or the markup in which the first call begins."""
    before = text.partition(str(calls[0]["function"]["name"]))[0]
    # Reasoning may precede the calls; its end is where they begin.
    *_, last = [match.end() for match in _REASONING_END.finditer(before)] or [0]
    return before[:last]
