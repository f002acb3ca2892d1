"""Rendering messages by a template, with text that is spelled like special tokens kept apart."""

import copy
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.compiled_template import CLOSED, template_writer
from peftchat.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateMessage = Mapping[str, Any]
"""A message in the form of `apply_chat_template`."""

Tools = Sequence[Any] | None
"""JSON schemas of tools, in the form of `apply_chat_template`."""

_ACCIDENTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a template raises besides jinja2's own errors."""

PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds a text.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string", "description": "The text."}}},
    },
}
"""The definition of a tool, to learn what a template does with one."""


class TemplateRenderer:
    """Renders messages by a tokenizer's template, with special tokens in their text kept apart.

    Text in a message that is spelled like a special token is replaced by a placeholder before rendering (`protect`).
    Every special token in the rendered text is then the template's own. `restore` puts the text back.

    Args:
        tokenizer: gives the template its special tokens.
        jinja: the template, or several by name, as `chat_template` holds them.
        special: the texts of its special tokens.
        variables: further variables of the template.

    Attributes:
        special: matches one special token.
        bos_token: what the tokenizer's `bos_token` is spelled like; "" without one.
        jinja: the template.
        variables: further variables of the template.
        reasoning_in_parts: whether the template reads reasoning as a part of the content.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        jinja: str | Mapping[str, str],
        special: Sequence[str],
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._write = template_writer(tokenizer)
        self.bos_token = str(tokenizer.bos_token or "")
        self.jinja = jinja
        self.variables = dict(variables or {})
        self.reasoning_in_parts = False
        self._remembered: dict[str, str] = {}
        by_length = sorted(special, key=len, reverse=True)
        # `(?!)` matches nothing.
        self.special = re.compile("(" + ("|".join(map(re.escape, by_length)) or "(?!)") + ")")
        self._nonce = nonce = secrets.token_hex(6)
        self._placeholders = {token: f"x{nonce}n{number}x" for number, token in enumerate(by_length)}
        self._texts = {placeholder: token for token, placeholder in self._placeholders.items()}
        self._placeholder = re.compile(rf"x{nonce}n\d+x")

    def render(self, messages: Sequence[TemplateMessage], tools: Tools, *, generation_prompt: bool) -> str:
        """Return the rendered text.

        Raises:
            UserError: the template raised an error.
        """
        from jinja2.exceptions import SecurityError, TemplateError, UndefinedError

        try:
            return self._apply(messages, tools, generation_prompt=generation_prompt)
        # A template is code by the model's authors. It may raise an error of its own or fail by accident.
        except (SecurityError, UndefinedError, *_ACCIDENTS) as error:
            message = f"the chat template fails on the conversation: {first_line(error)}"
            unset = re.fullmatch(r"'(\w+)' is undefined", first_line(error))
            if unset and isinstance(error, UndefinedError):
                raise UserError(
                    f"the chat template needs the variable `{unset[1]}`, and nothing sets it",
                    hint=f"Set `chat.template_kwargs: {{{unset[1]}: …}}` to what the model's makers give it.",
                ) from error
            if (
                not tools
                and self._renders([probe_turn("user")], [PROBE_TOOL])
                and not self._renders([probe_turn("user")], None)
            ):
                message = "the chat template needs tools, and the conversation defines none"
            raise UserError(message) from error
        except TemplateError as error:
            raise UserError(f"the chat template cannot write the conversation: {first_line(error)}") from error

    def render_all(self, conversations: Iterable[tuple[Sequence[TemplateMessage], Tools]]) -> list[str | None]:
        """Return the renderings of conversations without generation prompts; None for one that the template refuses."""
        found: list[str | None] = []
        for messages, tools in conversations:
            try:
                found.append(self._apply(messages, tools, generation_prompt=False))
            except Exception:  # a template is code; each conversation is told for itself
                found.append(None)
        return found

    def render_both(self, messages: Sequence[TemplateMessage], tools: Tools) -> tuple[str, str] | None:
        """Return the renderings with and without a generation prompt; None if one of them has to be made for itself."""
        try:
            text = self._apply(messages, tools, generation_prompt=True, marked=True)
        except Exception:  # `render` tells what it is
            return None
        closed, mark, opening = text.partition(CLOSED)
        return (closed + opening, closed) if mark else None

    def remember(self, name: str, make: Callable[[], str]) -> str:
        """Return a text that depends on nothing but the template and its variables, which is made once."""
        if name not in self._remembered:
            self._remembered[name] = make()
        return self._remembered[name]

    def _apply(
        self, messages: Sequence[TemplateMessage], tools: Tools, *, generation_prompt: bool, marked: bool = False
    ) -> str:
        if self.reasoning_in_parts:
            messages = [with_reasoning_parts(message) for message in messages]
        return self._write(
            self._template(tools),
            messages,
            tools or None,
            marked=marked,
            add_generation_prompt=generation_prompt,
            **self.variables,
        )

    def _renders(self, messages: Sequence[TemplateMessage], tools: Tools) -> bool:
        """Return whether the template takes these messages."""
        try:
            self._apply(messages, tools, generation_prompt=True)
        except Exception:
            return False
        return True

    def writes(self, texts: Sequence[str], messages: Sequence[TemplateMessage]) -> bool:
        """Return whether the prompt behind these messages has all texts, with tools or without."""
        for tools in (None, [PROBE_TOOL]):
            try:
                prompt = self._apply(messages, tools, generation_prompt=True)
                if all(text in prompt for text in texts):
                    return True
            except Exception:  # noqa: S112 - templates raise what they like where they refuse
                continue
        return False

    def with_variables(self, variables: Mapping[str, Any]) -> "TemplateRenderer":
        """Return a renderer of the same template with these variables on top; placeholders stay the same."""
        other = copy.copy(self)
        other.variables = {**self.variables, **variables}
        other._remembered = {}
        return other

    def with_template(self, jinja: str | Mapping[str, str]) -> "TemplateRenderer":
        """Return a renderer of another template; placeholders stay the same."""
        other = copy.copy(self)
        other.jinja = jinja
        other._remembered = {}
        return other

    def _template(self, tools: Tools) -> str:
        """Return the source to render with: models may have one of their own for tools."""
        if isinstance(self.jinja, str):
            return self.jinja
        name = "tool_use" if tools and "tool_use" in self.jinja else "default"
        return self.jinja[name]

    def protect(self, value: Any) -> Any:
        """Return a message, or a part of one, with placeholders for text spelled like special tokens."""
        if isinstance(value, str):
            return self.special.sub(lambda match: self._placeholders[match[0]], value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """Return a rendered text with the placeholders replaced by what stands in the messages."""
        if self._nonce not in text:
            return text
        return self._placeholder.sub(lambda match: self._texts[match[0]], text)


def with_reasoning_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning is a part of its content."""
    if not message.get("reasoning_content"):
        return dict(message)
    parts = [{"type": "thinking", "thinking": message["reasoning_content"]}]
    if message.get("content"):
        parts.append({"type": "text", "text": message.get("content")})
    return {**{key: value for key, value in message.items() if key != "reasoning_content"}, "content": parts}


def probe_turn(role: str, call: Mapping[str, Any] | None = None) -> TemplateMessage:
    """Return a message of one word, for a result with the id and the name of its call."""
    if call is None:
        return {"role": role, "content": "next"}
    found = {"role": role, "content": "next", "name": call["function"]["name"]}
    return {**found, "tool_call_id": call["id"]} if "id" in call else found
