"""Prompt: a conversation encoded for the next answer."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.loss_mask import TurnPart, part_of
from peftchat.chat_template.templates import TemplateSpan
from peftchat.chat_template.text_encoder import TextEncoder
from peftchat.chat_template.tokenizer_template import TokenizerTemplate
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (Message("user", "question"), Message("assistant", "answer"))
# The spelling of special tokens in chat templates; no other text of a template looks like this.
_TOKEN_SPELLING = re.compile(r"<\|[^\s<>|]+\|>")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of an answer.

    Attributes:
        ids: the conversation and the generation prompt.
        dropped: rounds removed from the front because they did not fit.
        special_token_text: texts in the messages that are spelled like a special token and are encoded as text.
    """

    ids: list[int]
    dropped: int
    special_token_text: int


class _WithGenerationPrompt:
    """The tokenizer's own template with the generation prompt after the conversation."""

    def __init__(self, template: TokenizerTemplate, generation_prompt: tuple[TemplateSpan, ...]) -> None:
        self._template = template
        self._generation_prompt = generation_prompt

    def spans(self, conversation: Conversation) -> Iterator[TemplateSpan]:
        yield from self._template.spans(conversation)
        yield from self._generation_prompt


class PromptEncoder:
    """Encodes conversations by the tokenizer's own chat template.

    A conversation goes through `apply_chat_template`, unless a message contains the text of a special token. Then it is
    encoded span by span, so that nothing a user types becomes a special token.

    Args:
        tokenizer: with a `chat_template`.

    Raises:
        UserError: the template writes no special token after an answer, so no token ends one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._text = TextEncoder(tokenizer)
        self._template = TokenizerTemplate(tokenizer)

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        return self._text.special[self._template.end_token]

    @property
    def turn_ids(self) -> frozenset[int]:
        """Special tokens that open a turn.

        An answer that generates one of them has started another turn.
        """
        spans = self._template.spans(Conversation(_PROBE * 2))
        headers = (span.text for span in spans if span.special and part_of(span.tag) == TurnPart.HEADER)
        return frozenset(self._text.special[text] for text in headers) - {self.end_id}

    def check(self, where: str) -> None:
        """Check that the tokenizer has the special tokens that its template writes.

        Raises:
            UserError: names the first that is missing.
        """
        for text in (self._render(_PROBE, generation_prompt=False), self._generation_prompt()):
            for token in _TOKEN_SPELLING.findall(text):
                if token not in self._text.special:
                    raise UserError(
                        f"the chat template writes {token}, which is not a special token of the tokenizer",
                        where=where,
                        hint="Take template and tokenizer from the same run.",
                    )

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """Encode a conversation that ends with the user's message.

        The generation prompt is appended.

        Raises:
            UserError: the template rejects the conversation, or changes text that is spelled like a special token.
        """
        special_token_text = sum(self._text.count_special_token_text([message.content for message in messages]))
        if special_token_text:
            template = _WithGenerationPrompt(TokenizerTemplate(self._tokenizer), self._generation_prompt_spans())
            (example,) = ChatEncoder(self._tokenizer, template).encode([Conversation(tuple(messages))])
            return Prompt(example.ids.tolist(), 0, special_token_text)
        ids = self._tokenizer.encode(self._render(messages, generation_prompt=True), add_special_tokens=False)
        return Prompt(ids, 0, 0)

    def truncate_to_fit(self, messages: Sequence[Message], limit: int) -> Prompt:
        """Encode a conversation within `limit` tokens.

        Rounds are removed from its front; the system message stays.

        Raises:
            UserError: the last message alone is too long.
        """
        return truncate_prompt(messages, limit, self.encode)

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        dicts = Conversation(tuple(messages)).as_dicts()
        try:
            return str(
                self._tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template rejects the conversation: {error}") from error

    def _generation_prompt(self) -> str:
        closed = self._render(_PROBE[:1], generation_prompt=False)
        opened = self._render(_PROBE[:1], generation_prompt=True)
        if not opened.startswith(closed):
            raise UserError("the generation prompt of the model's chat template is not appended to the conversation")
        return opened[len(closed) :]

    def _generation_prompt_spans(self) -> tuple[TemplateSpan, ...]:
        text = self._generation_prompt()
        special = "|".join(map(re.escape, sorted(self._text.special, key=len, reverse=True)))
        parts = re.split(f"({special})", text)
        return tuple(
            TemplateSpan(part, int(TurnPart.HEADER), special=number % 2 == 1)
            for number, part in enumerate(parts)
            if part
        )


def truncate_prompt(messages: Sequence[Message], limit: int, encode: Callable[[Sequence[Message]], Prompt]) -> Prompt:
    """Remove rounds from the front until the prompt has at most `limit` tokens.

    A round is a user's message with everything up to the next one.

    Raises:
        UserError: even the last message alone is too long.
    """
    start = 1 if messages and messages[0].role == "system" else 0
    turns = [index for index, message in enumerate(messages) if message.role == "user"]
    for dropped, turn in enumerate(turns):
        prompt = encode([*messages[:start], *messages[turn:]])
        if len(prompt.ids) <= limit:
            return Prompt(prompt.ids, dropped, prompt.special_token_text)
    raise UserError(
        f"the prompt of the message has {len(prompt.ids)} tokens, but the model's context allows {limit}",
        hint="Shorten it, or use a model with a longer context.",
    )
