"""`chat.template: model`: the tokenizer's own template, with a mask that is still exact.

A Jinja template can do anything to a conversation, so its output is not searched for the answers. It is rendered
once with the messages and once with a marker in place of each message's content; where the second text, with the
contents put back, equals the first, the markers say exactly where every content stands.
"""

import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftchat.chatml.mask import Part, code
from peftchat.chatml.template import Piece, last_answer_index
from peftchat.chatml.tokens import special_tokens
from peftchat.conversation import Conversation, Role
from peftchat.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelTemplate:
    """The template that a tokenizer brings.

    Args:
        tokenizer: with a `chat_template`.
        system: the system prompt of conversations that have none; None leaves that to the template.

    Raises:
        InputError: the tokenizer has no template, or its template ends answers without a special token.
    """

    name = "model"
    tokens: tuple[str, ...] = ()

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                "the model's tokenizer has no chat template",
                where="chat.template: model",
                cure="Use `starchat` or `chatml`.",
            )
        self._tokenizer = tokenizer
        self._system = system
        by_length = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None
        self._nonce = secrets.token_hex(8)
        self._marker = re.compile(rf"{self._nonce}-(\d+)-")
        self.end_token = self._find_end_token()

    @property
    def jinja(self) -> str:
        """The tokenizer's template, unchanged."""
        return str(self._tokenizer.chat_template)

    def pieces(self, conversation: Conversation) -> Iterator[Piece]:
        """The conversation as the template writes it.

        Raises:
            InputError: the template refuses the conversation, or rewrites a message's content.
        """
        messages = conversation.as_dicts()
        if self._system is not None and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self._system}, *messages]
        offset = len(messages) - len(conversation.messages)
        rendered = self._render(messages, conversation)
        contents = [message["content"] for message in messages]
        for candidate in (contents, [content.strip() for content in contents]):
            marked = [{**message, "content": self._mark(index)} for index, message in enumerate(messages)]
            skeleton = self._render(marked, conversation)
            if self._filled(skeleton, candidate) == rendered:
                last = last_answer_index(conversation)
                yield from self._split(skeleton, candidate, messages, last + offset if last >= 0 else -1)
                return
        raise InputError(
            "the model's template rewrites the content of a message, so that no exact mask exists",
            where=conversation.source or None,
            cure="Use `chat.template: chatml` or `starchat`, or take such messages out.",
        )

    def _mark(self, index: int) -> str:
        return f"{self._nonce}-{index}-"

    def _filled(self, skeleton: str, contents: list[str]) -> str:
        return self._marker.sub(lambda match: contents[int(match.group(1))], skeleton)

    def _render(self, messages: list[dict[str, str]], conversation: Conversation) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise InputError(
                f"the model's chat template refuses the dialogue: {error}", where=conversation.source or None
            ) from error

    def _split(self, skeleton: str, contents: list[str], messages: list[dict[str, str]], last: int) -> Iterator[Piece]:
        """The pieces of a rendered skeleton: text between two markers ends one turn and begins the next."""
        stretches = self._marker.split(skeleton)
        shown = [int(number) for number in stretches[1::2]]
        yield from self._text(stretches[0], code(Part.OUTSIDE))
        for place, index in enumerate(shown):
            role = _role(messages[index]["role"])
            is_last = index == last
            if contents[index]:
                yield Piece(contents[index], code(Part.CONTENT, role, last_answer=is_last))
            after = stretches[2 * place + 2]
            end, trailer, header = self._after_content(after)
            yield from self._text(end, code(Part.END, role, last_answer=is_last))
            yield from self._text(trailer, code(Part.TRAILER, role, last_answer=is_last))
            following = shown[place + 1] if place + 1 < len(shown) else None
            if following is None:
                yield from self._text(header, code(Part.OUTSIDE))
            else:
                next_role = _role(messages[following]["role"])
                yield from self._text(header, code(Part.HEADER, next_role, last_answer=following == last))

    def _after_content(self, text: str) -> tuple[str, str, str]:
        """What follows a content: up to and with the end token, white space after it, the rest."""
        match = self._special.search(text) if self._special else None
        if match is None:
            return "", "", text
        rest = text[match.end() :]
        trailer = rest[: len(rest) - len(rest.lstrip())]
        return text[: match.end()], trailer, rest[len(trailer) :]

    def _text(self, text: str, value: int) -> Iterator[Piece]:
        """Template text, its special tokens apart."""
        if not text:
            return
        parts = self._special.split(text) if self._special else [text]
        for number, part in enumerate(parts):
            if part:
                yield Piece(part, value, special=number % 2 == 1)

    def _find_end_token(self) -> str:
        probe = [{"role": "user", "content": self._mark(0)}, {"role": "assistant", "content": self._mark(1)}]
        rendered = self._render(probe, Conversation(()))
        after = rendered.rpartition(self._mark(1))[2]
        match = self._special.search(after) if self._special else None
        if match is None:
            raise InputError(
                "the model's chat template writes no special token after an answer, so nothing would end it",
                where="chat.template: model",
                cure="Use `starchat` or `chatml`.",
            )
        return match.group()


def _role(name: str) -> Role:
    from typing import cast

    return cast(Role, name)
