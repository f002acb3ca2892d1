"""That a template wrote everything that the messages hold, each part at its own place."""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftchat.chat_template.answer_rendering import AnswerRenderer, RenderedAnswer
from peftchat.chat_template.template_renderer import TemplateMessage, TemplateRenderer, Tools
from peftchat.chat_template.template_settings import TemplateSettings, with_settings
from peftchat.errors import UserError

_REASONING_TAG = re.compile(r"</?[\w:]*think\w*>|\[/?THINK\]")
_REASONING_END = re.compile(r"</[\w:]*think\w*>|\[/THINK\]")

_WITH_REASONING: tuple[dict[str, Any], ...] = ({"enable_thinking": True}, {"thinking": True}, {"reasoning": True})
"""Variables by which templates turn reasoning on."""

_TELLING = 24
"""A text of fewer characters may stand in a rendering by accident, as a part of something else."""


@dataclass(frozen=True, slots=True)
class WrittenCheck:
    """Checks that the template wrote everything that the messages of one conversation hold.

    Earlier reasoning may be left out: many templates do that, and the prompt at inference leaves it out too.

    Texts are searched for in the rendering. A short one could be found elsewhere, and a reasoning within its content.
    The same messages are then rendered with a mark in the place of each text.

    Attributes:
        renderer: rendered the answers.
        messages: the conversation, protected.
        tools: its tools, protected.
        end_token: of the recipe, for the setting that an error names.
    """

    renderer: TemplateRenderer
    messages: Sequence[TemplateMessage]
    tools: Tools
    end_token: str | None = None

    def check(self, answer: RenderedAnswer, first: int) -> None:
        """Check an answer and what precedes it.

        Args:
            answer: an answer behind its prompt.
            first: the first message that no check has covered yet.

        Raises:
            UserError: names the part that is not in the text, and the message.
        """
        prompt = _Text(answer.prompt)
        short = False
        for index in range(first, answer.index):
            for what, value in _parts(self.messages[index], reasoning=False):
                if not prompt.holds(value):
                    raise self._not_written(index, what, value)
                short = short or (what == "content" and len(value.strip()) < _TELLING)
        if short:
            self._check_marks_before(answer, first)
        written = _Text(answer.text)
        for what, value in _parts(self.messages[answer.index], reasoning=True):
            if not written.holds(value):
                raise self._not_written(answer.index, what, value)
        if self.messages[answer.index].get("reasoning_content"):
            self._check_marked_reasoning(answer)
        if first == 0:
            self._check_tools(prompt)
            self._check_documents(prompt)

    def _check_tools(self, prompt: "_Text") -> None:
        for tool in self.tools or ():
            name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
            if name and not prompt.holds(str(name)):
                name = self.renderer.restore(str(name))
                raise UserError(
                    f"the chat template does not write the tool `{name}`, so the model would not see it",
                    hint="Choose a template that knows tools, such as `chat.template: chatml`, or remove `tools`.",
                )

    def _check_documents(self, prompt: "_Text") -> None:
        """Check that the longest text of each document is in the prompt: templates write some fields of it only."""
        for number, document in enumerate(self.renderer.variables.get("documents") or (), 1):
            texts = list(_texts(document))
            longest = max(texts, key=len, default="")
            if not prompt.holds(longest):
                fields = ", ".join(f"`{name}`" for name in document) if isinstance(document, Mapping) else "text"
                raise UserError(
                    f"the chat template does not write document {number}, which has {fields}",
                    hint="Name its fields as the template reads them, such as `title` and `text`, or remove "
                    "`documents`.",
                )

    def _check_marks_before(self, answer: RenderedAnswer, first: int) -> None:
        """Check that the prompt holds a mark in the place of each content before the answer."""
        marks = {index: _mark() for index in range(first, answer.index) if self._content(index)}
        marked = [
            {**message, "content": marks[index]} if index in marks else message
            for index, message in enumerate(self.messages[: answer.index])
        ]
        try:
            prompt = self.renderer.render(marked, self.tools, generation_prompt=True)
        except UserError:
            return
        for index, mark in marks.items():
            if mark not in prompt:
                raise self._not_written(index, "content", self._content(index))

    def _check_marked_reasoning(self, answer: RenderedAnswer) -> None:
        """Check that the answer holds a mark in the place of its reasoning."""
        message, mark = self.messages[answer.index], _mark()
        marked = [*self.messages[: answer.index], {**message, "reasoning_content": mark}]
        try:
            full = self.renderer.render(marked, self.tools, generation_prompt=False)
        except UserError:
            return
        if mark not in full:
            raise self._not_written(answer.index, "reasoning", str(message["reasoning_content"]))

    def _content(self, index: int) -> str:
        return str(self.messages[index].get("content") or "").strip()

    def _not_written(self, index: int, what: str, value: str) -> UserError:
        """Return the error for a part that is not in the text, with the setting that mends it."""
        shown = self.renderer.restore(value).strip()
        shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
        return UserError(
            f"the chat template does not write the {what} of message {index + 1} "
            f"({self.messages[index]['role']}): {shown!r}",
            hint=f"{self._setting(index) if what == 'reasoning' else ''}"
            "Choose a template that writes it, such as `chat.template: chatml`, or remove it from the data.",
        )

    def _setting(self, index: int) -> str:
        """Return the setting by which the reasoning of an answer is written, as a sentence; "" if there is none."""
        for variables in _WITH_REASONING:
            if self._writes_reasoning(self.renderer.with_variables(variables), index):
                ((name, value),) = variables.items()
                return f"Set `chat.template_kwargs: {{{name}: {str(value).lower()}}}`, with which it writes reasoning. "
        inline = with_settings(self.renderer.jinja, TemplateSettings(reasoning_format="inline"), None, frozenset())
        if self._writes_reasoning(self.renderer.with_template(inline), index):
            return "Set `chat.reasoning_format: inline`, which puts it into the content as `<think>…</think>`. "
        return ""

    def _writes_reasoning(self, renderer: TemplateRenderer, index: int) -> bool:
        """Return whether an answer with a mark as its reasoning stands behind its prompt, and holds the mark."""
        mark = _mark()
        messages = [*self.messages[:index], {**self.messages[index], "reasoning_content": mark}]
        try:
            answer = AnswerRenderer(renderer, messages, self.tools, self.end_token).answer(index)
        except UserError:
            return False
        return mark in answer.text


def _mark() -> str:
    return f"x{secrets.token_hex(6)}x"


class _Text:
    """A rendered text, and whether it holds a value in one of the spellings of templates."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._squeezed: str | None = None

    def holds(self, value: str) -> bool:
        value = value.strip()
        if value in self._text:
            return True
        for spelled in (json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1]):
            if spelled in self._text:
                return True
        if self._squeezed is None:
            self._squeezed = "".join(self._text.split())
        if "".join(value.split()) in self._squeezed:
            return True
        parts = _REASONING_TAG.split(value)
        return len(parts) > 1 and all(self.holds(part) for part in parts)


def _parts(message: TemplateMessage, *, reasoning: bool) -> Iterator[tuple[str, str]]:
    """Yield what a template has to write of a message, each with a name."""
    content = str(message.get("content") or "")
    if not reasoning and message["role"] == "assistant":
        *_, content = _REASONING_END.split(content)
    if content.strip():
        yield "content", content
    for call in message.get("tool_calls") or ():
        function = call["function"]
        yield "tool call", str(function["name"])
        arguments = function["arguments"]
        for value in _leaves(json.loads(arguments) if isinstance(arguments, str) and arguments else arguments):
            yield "arguments of a tool call", value
    # A setting mends this one, and none of the others.
    if reasoning and message.get("reasoning_content"):
        yield "reasoning", str(message["reasoning_content"])


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _leaves(value: Any) -> Iterator[str]:
    """Yield every key and every text in a JSON value; numbers have several spellings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
