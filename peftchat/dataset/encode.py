"""What became of the conversations of one side."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample, ExampleBatch
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.conversation import Conversation
from peftchat.dataset.truncation import truncate_to_fit
from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


_NAMED = 5


@dataclass(slots=True)
class EncodingStats:
    """What became of the conversations of one side.

    Attributes:
        rows: rows that are kept.
        tokens: their tokens.
        supervised: their tokens that carry a target.
        dropped: conversations and rows that are not, by reason.
        named: the first few sources of each reason, and of the conversations that were `shortened` or `divided`.
        shortened: conversations that lost exchanges to fit `data.max_length`.
        exchanges_cut: exchanges lost that way.
        divided: conversations that became several rows to fit.
        parts: those rows.
        lookalikes: stretches spelled like a special token, encoded as ordinary text.
        forms: the form each source file was read as.
        notes: rows that a source changed, by what it did.
    """

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    shortened: int = 0
    exchanges_cut: int = 0
    divided: int = 0
    parts: int = 0
    lookalikes: int = 0
    forms: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, source: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._name(reason, source)

    def shorten(self, exchanges: int, source: str) -> None:
        """Count a conversation that lost exchanges."""
        self.shortened += 1
        self.exchanges_cut += exchanges
        self._name("shortened", source)

    def divide(self, parts: int, source: str) -> None:
        """Count a conversation that became several rows."""
        self.divided += 1
        self.parts += parts
        self._name("divided", source)

    def _name(self, what: str, source: str) -> None:
        named = self.named.setdefault(what, [])
        if len(named) < _NAMED:
            named.append(source)


_BATCH = 1024
_BATCH_CHARACTERS = 2**21
"""A batch ends here even if it has few conversations, so that long ones do not fill the memory."""
_WORKERS = 2
"""The tokenizer's threads use all cores by themselves; a second batch keeps them busy while Python has the first."""


def encode_conversations(
    recipe: "Recipe", encoder: ChatEncoder, conversations: Iterable[Conversation], stats: EncodingStats
) -> Iterator[ExampleBatch]:
    """Batches of rows, in the order of their conversations.

    Args:
        recipe: says what fits, what is trained and what is refused.
        encoder: of the recipe's format.
        conversations: read while earlier ones are encoded.
        stats: counts what became of each.

    Raises:
        UserError: a conversation holds what the recipe refuses.
    """
    table = loss_mask_table(recipe.chat.loss_on)
    for batch, rows in _in_flight(encoder, conversations):
        if recipe.chat.special_text == "refuse" and rows.special_token_text.any():
            raise _special_text(rows.sources[int(rows.special_token_text.argmax())])
        if rows.lengths.max() > recipe.data.max_length:
            rows = _fitting(recipe, encoder, batch, rows, stats)
        supervised = rows.counts(table)
        if not supervised.all():
            rows = _learnable(recipe, rows, supervised > 0, stats)
        stats.rows += len(rows)
        stats.tokens += len(rows.ids)
        stats.supervised += int(supervised.sum())
        stats.lookalikes += int(rows.special_token_text.sum())
        yield rows


def _in_flight(
    encoder: ChatEncoder, conversations: Iterable[Conversation]
) -> Iterator[tuple[Sequence[Conversation], ExampleBatch]]:
    """Each batch with its rows, in order, the next ones being read and encoded meanwhile."""
    waiting: deque[tuple[Sequence[Conversation], Future[ExampleBatch]]] = deque()
    with ThreadPoolExecutor(_WORKERS if encoder.parallel else 1) as pool:
        try:
            for batch in _batches(conversations):
                waiting.append((batch, pool.submit(encoder.batch, batch)))
                if len(waiting) > _WORKERS:
                    done, rows = waiting.popleft()
                    yield done, rows.result()
            while waiting:
                done, rows = waiting.popleft()
                yield done, rows.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    characters = 0
    for conversation in conversations:
        batch.append(conversation)
        for message in conversation.messages:
            characters += len(message.content)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fitting(
    recipe: "Recipe", encoder: ChatEncoder, batch: Sequence[Conversation], rows: ExampleBatch, stats: EncodingStats
) -> ExampleBatch:
    """The rows that fit, and what is left of the others."""
    limit, policy = recipe.data.max_length, recipe.data.truncation
    kept: list[EncodedExample] = []
    for conversation, row in zip(batch, rows, strict=True):
        if len(row.ids) <= limit:
            kept.append(row)
            continue
        if policy == "refuse":
            raise UserError(
                f"the conversation has {len(row.ids)} tokens, and data.max_length is {limit}",
                where=conversation.source or None,
                hint="Raise data.max_length, or set data.truncation: turns, turns_leading, split or drop.",
            )
        if policy == "drop":
            stats.drop("too_long", conversation.source)
            continue
        fitted = truncate_to_fit(conversation, row, encoder, limit, policy)
        kept += fitted.rows
        if not fitted.rows:
            stats.drop("too_long", conversation.source)
        elif fitted.lost:
            stats.shorten(fitted.lost, conversation.source)
        if len(fitted.rows) > 1:
            stats.divide(len(fitted.rows), conversation.source)
    return ExampleBatch.of(kept)


def _learnable(
    recipe: "Recipe", rows: ExampleBatch, has_targets: npt.NDArray[np.bool_], stats: EncodingStats
) -> ExampleBatch:
    """The rows that have something to learn."""
    kept: list[EncodedExample] = []
    for row, learnable in zip(rows, has_targets, strict=True):
        if learnable:
            kept.append(row)
        elif recipe.chat.empty_rows == "refuse":
            raise UserError(
                f"nothing in the conversation is trained by chat.loss_on: {recipe.chat.loss_on}",
                where=row.source or None,
                hint="Take the conversation out, or set chat.empty_rows: drop to leave such rows out.",
            )
        else:
            stats.drop("nothing_to_learn", row.source)
    return ExampleBatch.of(kept)


def _special_text(source: str) -> UserError:
    return UserError(
        "a message holds text that is spelled like a special token, and chat.special_text is `refuse`",
        where=source or None,
        hint="Take the text out, or set chat.special_text: text to train on it as ordinary text.",
    )
