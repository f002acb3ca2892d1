"""`chat.template: model`: the tokenizer's own template, with an exact loss mask.

A Jinja template can do anything to a conversation, so its output is not searched for the answers. It is rendered twice:
with the messages, and with a marker in place of each message's content. If the second text with the contents put back
equals the first, the markers show where each content is.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypedDict

from peftchat.chat_template.loss_mask import TurnPart, token_tag
from peftchat.chat_template.message_text import message_text
from peftchat.chat_template.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE, TemplateSpan, last_answer_index
from peftchat.chat_template.text_encoder import special_tokens
from peftchat.conversation import Conversation, Role
from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[tuple[Role, str]]
ToolSchemas = list[dict[str, Any]] | None

_OTHERS = f"Set `chat.template` to {' or '.join(f'`{name}`' for name in CHAT_TEMPLATES)}."


class _Flags(TypedDict):
    last_answer: bool
    context: bool


class TokenizerTemplate:
    """The template that a tokenizer brings.

    Args:
        tokenizer: with a `chat_template`.
        system: the system message of conversations that have none. None leaves that to the template.

    Raises:
        UserError: the tokenizer has no template, or its template writes no special token behind an answer.
    """

    name = TOKENIZER_TEMPLATE
    special_tokens: Mapping[str, str] = MappingProxyType({})

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template",
                where="chat.template: model",
                hint=_OTHERS,
            )
        self._tokenizer = tokenizer
        self._system = system
        self.jinja = str(tokenizer.get_chat_template())
        by_length = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None
        self._nonce = secrets.token_hex(8)
        self._marker = re.compile(rf"{self._nonce}-(\d+)-")
        self._headers: dict[Role, str] = {}
        self.end_token = self._find_end_token()

    def spans(self, conversation: Conversation) -> Iterator[TemplateSpan]:
        """Yield the conversation as the template writes it.

        Raises:
            UserError: the template raises an error for the conversation, or rewrites a message's content.
        """
        turns = [(message.role, message_text(message)) for message in conversation.messages]
        context = [message.train is False for message in conversation.messages]
        last = last_answer_index(conversation)
        if self._system is not None and not (turns and turns[0][0] == "system"):
            turns.insert(0, ("system", self._system))
            context.insert(0, False)
            last = last + 1 if last >= 0 else -1
        source = conversation.source or None
        tools = conversation.tool_schemas()
        rendered = self._render(turns, source, tools)
        if tools and rendered == self._render(turns, source):
            raise UserError(
                "the conversation defines tools, and the model's chat template does not write them",
                where=source,
                hint=f"{_OTHERS} Or remove `tools` from the records.",
            )
        skeleton = self._skeleton([role for role, _ in turns], source, tools)
        contents = _match_contents(rendered, skeleton, [content for _, content in turns])
        if contents is None:
            raise UserError(
                "the model's template rewrites the content of a message, so that no exact mask exists",
                where=source,
                hint=f"{_OTHERS} Or remove such messages.",
            )
        yield from self._split(skeleton, contents, [role for role, _ in turns], last, context)

    def _render(self, turns: Turns, source: str | None, tools: ToolSchemas = None) -> str:
        from jinja2.exceptions import TemplateError

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        # A template is code by the model's authors. It may raise an error of its own or fail by accident.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"the model's chat template refuses the conversation: {error}", where=source) from error

    def _skeleton(self, roles: Sequence[Role], source: str | None = None, tools: ToolSchemas = None) -> list[str]:
        """Return the template's text around the contents, alternating with message indices; text at both ends."""
        marked = self._render([(role, f"{self._nonce}-{index}-") for index, role in enumerate(roles)], source, tools)
        return self._marker.split(marked)

    def _split(
        self, skeleton: list[str], contents: Sequence[str], roles: Sequence[Role], last: int, context: Sequence[bool]
    ) -> Iterator[TemplateSpan]:
        """Yield the spans of a skeleton. The text between two contents ends one turn and starts the next."""
        shown = [int(index) for index in skeleton[1::2]]
        opening = skeleton[0]
        header = self._header_of(opening, roles[shown[0]]) if shown else ""
        yield from self._template_text(opening.removesuffix(header), token_tag(TurnPart.OUTSIDE))
        for position, index in enumerate(shown):
            role, flags = roles[index], _Flags(last_answer=index == last, context=context[index])
            yield from self._template_text(header, token_tag(TurnPart.HEADER, role, **flags))
            if contents[position]:
                yield TemplateSpan(contents[position], token_tag(TurnPart.CONTENT, role, **flags))
            next_role = roles[shown[position + 1]] if position + 1 < len(shown) else None
            end, trailer, header = self._after_content(skeleton[2 * position + 2], next_role)
            yield from self._template_text(end, token_tag(TurnPart.END, role, **flags))
            yield from self._template_text(trailer, token_tag(TurnPart.TRAILER, role, **flags))
        yield from self._template_text(header if shown else "", token_tag(TurnPart.OUTSIDE))

    def _after_content(self, text: str, next_role: Role | None) -> tuple[str, str, str]:
        """Split the text behind a content: through the end token, the rest of the turn, the next turn's header."""
        header = self._header_of(text, next_role) if next_role else ""
        turn = text.removesuffix(header)
        match = self._special.search(turn) if self._special else None
        if match is None:
            return (turn, "", header) if header else ("", "", text)
        rest = turn[match.end() :]
        if header:
            return turn[: match.end()], rest, header
        trailer = rest[: len(rest) - len(rest.lstrip())]
        return turn[: match.end()], trailer, rest[len(trailer) :]

    def _header_of(self, text: str, role: Role) -> str:
        """Return the header of a turn of this role at the end of the text; "" if it is not known."""
        if role not in self._headers:
            self._headers[role] = self._find_header(role)
        return self._headers[role] if text.endswith(self._headers[role]) else ""

    def _find_header(self, role: Role) -> str:
        """Find the text between a finished turn and the content of one of this role; "" if there is no such text."""
        before: tuple[Role, ...] = ("user",) if role == "assistant" else ("user", "assistant")
        try:
            shorter = self._skeleton(before)
            longer = self._skeleton((*before, role))
        except UserError:
            return ""
        *shared, end = shorter
        if longer[: len(shared)] != shared or len(longer) != len(shorter) + 2 or not longer[-3].startswith(end):
            return ""
        return longer[-3].removeprefix(end)

    def _template_text(self, text: str, tag: int) -> Iterator[TemplateSpan]:
        """Yield text of the template, with each special token as a span of its own."""
        parts = self._special.split(text) if self._special else [text]
        for index, part in enumerate(parts):
            if part:
                yield TemplateSpan(part, tag, special=index % 2 == 1)

    def _find_end_token(self) -> str:
        after = self._skeleton(("user", "assistant"))[-1]
        match = self._special.search(after) if self._special else None
        if match is None:
            raise UserError(
                "the model's chat template writes no special token after an answer, so nothing would end it",
                where="chat.template: model",
                hint=_OTHERS,
            )
        return match.group()


def _match_contents(rendered: str, skeleton: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """Return the contents as the rendered text has them, in the order of the skeleton's markers.

    Templates strip white space from some or all contents. Contents that are changed in any other way do not match.

    Returns:
        One text per marker, or None if the skeleton with the contents put back is not the rendered text.
    """
    shown = [contents[int(index)] for index in skeleton[1::2]]
    texts = skeleton[0::2]
    # Maps each offset that a prefix of the contents can end at, with the text behind it, to these contents.
    matches: dict[int, list[str]] = {len(texts[0]): []} if rendered.startswith(texts[0]) else {}
    for content, text in zip(shown, texts[1:], strict=True):
        longer: dict[int, list[str]] = {}
        for start, before in matches.items():
            for form in _stripped_forms(content):
                stop = start + len(form) + len(text)
                if rendered.startswith(form, start) and rendered.startswith(text, start + len(form)):
                    longer.setdefault(stop, [*before, form])
        matches = longer
    return matches.get(len(rendered))


def _stripped_forms(content: str) -> list[str]:
    """Return the content and its forms without white space or newlines at one or both ends, the longest first."""
    if content and not content[0].isspace() and not content[-1].isspace():
        return [content]
    forms = {form(content) for form in (str.strip, str.lstrip, str.rstrip)}
    forms |= {content, content.strip("\n"), content.lstrip("\n"), content.rstrip("\n")}
    return sorted(forms, key=len, reverse=True)
