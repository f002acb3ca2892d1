"""A conversation so far as the ids that a model goes on from."""

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
# How chat formats spell their special tokens; in a template's own text nothing else looks like this.
_TOKEN_SPELLING = re.compile(r"<\|[^\s<>|]+\|>")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model gets.

    Attributes:
        ids: the conversation and the opening of the answer.
        dropped: exchanges left out at the front because they no longer fit.
        lookalikes: stretches of the messages that are spelled like a special token, encoded as ordinary text.
    """

    ids: list[int]
    dropped: int
    lookalikes: int


class _Opened:
    """The tokenizer's own template with the opening of an answer behind the conversation."""

    def __init__(self, template: TokenizerTemplate, opening: tuple[TemplateSpan, ...]) -> None:
        self._template = template
        self._opening = opening

    def spans(self, conversation: Conversation) -> Iterator[TemplateSpan]:
        yield from self._template.spans(conversation)
        yield from self._opening


class PromptEncoder:
    """Encodes conversations by the tokenizer's own chat template.

    A conversation without look-alikes of special tokens goes through `apply_chat_template`. One that has them is
    encoded piece by piece, so that nothing a user types becomes a special token.

    Args:
        tokenizer: with a `chat_template`.

    Raises:
        UserError: the template writes no special token after an answer, so that nothing would end one.
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
        """Special tokens that open a turn: an answer that writes one has gone on to speak for somebody else."""
        pieces = self._template.spans(Conversation(_PROBE * 2))
        headers = (piece.text for piece in pieces if piece.special and part_of(piece.tag) == TurnPart.HEADER)
        return frozenset(self._text.special[text] for text in headers) - {self.end_id}

    def check(self, where: str) -> None:
        """See that the tokenizer has the tokens that its template writes.

        Raises:
            UserError: naming the first that it has not.
        """
        for text in (self._render(_PROBE, opening=False), self._opening_text()):
            for token in _TOKEN_SPELLING.findall(text):
                if token not in self._text.special:
                    raise UserError(
                        f"the chat template writes {token}, which is not a special token of the tokenizer",
                        where=where,
                        hint="Template and tokenizer do not belong together; take both from the same run.",
                    )

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """The ids of a conversation that ends with the user's message, and of the opening of the answer.

        Raises:
            UserError: the template refuses the conversation, or rewrites text that looks like a special token.
        """
        lookalikes = sum(self._text.lookalikes([message.content for message in messages]))
        if lookalikes:
            template = _Opened(TokenizerTemplate(self._tokenizer), self._opening_pieces())
            (row,) = ChatEncoder(self._tokenizer, template).encode([Conversation(tuple(messages))])
            return Prompt(row.ids.tolist(), 0, lookalikes)
        ids = self._tokenizer.encode(self._render(messages, opening=True), add_special_tokens=False)
        return Prompt(ids, 0, 0)

    def fit(self, messages: Sequence[Message], limit: int) -> Prompt:
        """The conversation within `limit` tokens: whole exchanges go from its front, the system message stays.

        Raises:
            UserError: the last message alone is too long.
        """
        return truncate_prompt(messages, limit, self.encode)

    def _render(self, messages: Sequence[Message], *, opening: bool) -> str:
        from jinja2.exceptions import TemplateError

        dicts = Conversation(tuple(messages)).as_dicts()
        try:
            return str(self._tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=opening))
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses the conversation: {error}") from error

    def _opening_text(self) -> str:
        closed = self._render(_PROBE[:1], opening=False)
        opened = self._render(_PROBE[:1], opening=True)
        if not opened.startswith(closed):
            raise UserError("the model's chat template does not open an answer by adding to the conversation")
        return opened[len(closed) :]

    def _opening_pieces(self) -> tuple[TemplateSpan, ...]:
        text = self._opening_text()
        special = "|".join(map(re.escape, sorted(self._text.special, key=len, reverse=True)))
        parts = re.split(f"({special})", text)
        return tuple(
            TemplateSpan(part, int(TurnPart.HEADER), special=number % 2 == 1)
            for number, part in enumerate(parts)
            if part
        )


def truncate_prompt(messages: Sequence[Message], limit: int, encode: Callable[[Sequence[Message]], Prompt]) -> Prompt:
    """Drop exchanges from the front of a conversation until its prompt has at most `limit` tokens.

    An exchange is a user's message with everything up to the next one.

    Raises:
        UserError: even the last message alone is too long.
    """
    start = 1 if messages and messages[0].role == "system" else 0
    turns = [index for index, message in enumerate(messages) if message.role == "user"]
    for dropped, turn in enumerate(turns):
        prompt = encode([*messages[:start], *messages[turn:]])
        if len(prompt.ids) <= limit:
            return Prompt(prompt.ids, dropped, prompt.lookalikes)
    raise UserError(
        f"the message takes {len(prompt.ids)} tokens with its frame, and the model has room for {limit}",
        hint="Shorten it, or take a model with a longer context.",
    )
