"""Prompt: a conversation encoded for the next answer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import TurnPart, part_of
from peftchat.chat_template.template_settings import TemplateSettings
from peftchat.chat_template.text_encoder import TextEncoder
from peftchat.chat_template.tokenizer_template import TokenizerTemplate
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.serving.reasoning import opens_reasoning

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


def _template_of(tokenizer: "PreTrainedTokenizerBase", text: TextEncoder) -> TokenizerTemplate:
    """Return the tokenizer's template; where it writes nothing behind an answer, `eos_token` ends one.

    A run's `chat.end_token` is the `eos_token` of its tokenizer.
    """
    try:
        return TokenizerTemplate(tokenizer, text=text)
    except UserError:
        if not tokenizer.chat_template or tokenizer.eos_token is None:
            raise
    settings = TemplateSettings(end_token=str(tokenizer.eos_token))
    return TokenizerTemplate(tokenizer, settings=settings, text=text)


class PromptEncoder:
    """Encodes conversations by the tokenizer's own chat template.

    A conversation is encoded as in training: nothing that a user types becomes a special token.

    Args:
        tokenizer: with a `chat_template`.

    Raises:
        UserError: the template writes no special token after an answer, and the tokenizer has no `eos_token`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._text = TextEncoder(tokenizer)
        self._template = _template_of(tokenizer, self._text)
        self._encoder = ChatEncoder(tokenizer, self._template, self._text)

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        return self._text.special[self._template.end_token]

    @property
    def turn_ids(self) -> frozenset[int]:
        """Special tokens that open a turn.

        An answer that generates one of them has started another turn.
        """
        spans = self._template.prompt(Conversation((*_PROBE, *_PROBE[:1])))
        headers = (span.text for span in spans if span.special and part_of(span.tag) == TurnPart.HEADER)
        return frozenset(self._text.special[text] for text in headers) - {self.end_id}

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether the generation prompt opens a reasoning, which the answer then only closes."""
        return opens_reasoning(self._tokenizer.decode(self.encode(_PROBE[:1]).ids))

    def check(self, where: str) -> None:
        """Check that the tokenizer has the special tokens that its template writes.

        Raises:
            UserError: names the first that is missing.
        """
        for message in (_PROBE[:1], (*_PROBE, *_PROBE[:1])):
            for span in self._template.prompt(Conversation(message)):
                for token in [] if span.special else _TOKEN_SPELLING.findall(span.text):
                    raise UserError(
                        f"the chat template writes {token}, which is not a special token of the tokenizer",
                        where=where,
                        hint="Take template and tokenizer from the same run.",
                    )

    def encode(self, messages: Sequence[Message], tools: str | None = None) -> Prompt:
        """Encode a conversation that ends with the user's message, with the generation prompt.

        Nothing that a message holds becomes a special token.

        Args:
            messages: the conversation.
            tools: definitions of tools, JSON text of a list.

        Raises:
            UserError: the template refuses the conversation.
        """
        special_token_text = sum(self._text.count_special_token_text([message.content for message in messages]))
        spans = self._template.prompt(Conversation(tuple(messages), tools=tools))
        return Prompt(self._encoder.encode_spans(spans), 0, special_token_text)

    def encode_answers(self, conversation: Conversation) -> list[EncodedExample]:
        """Encode a conversation that ends with an answer, as training does: one example, or several.

        Raises:
            UserError: the template refuses the conversation.
        """
        return self._encoder.encode([conversation])

    def truncate_to_fit(self, messages: Sequence[Message], limit: int, tools: str | None = None) -> Prompt:
        """Encode a conversation within `limit` tokens.

        Rounds are removed from its front; the system message stays.

        Raises:
            UserError: the last message alone is too long.
        """
        return truncate_prompt(messages, limit, lambda kept: self.encode(kept, tools))


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
