"""Dialogues to rows that fit and have something to learn, in batches, with everything else counted."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.chatml.encode import RowEncoder
from peftchat.chatml.mask import policy_table
from peftchat.chatml.rows import Row, RowBatch
from peftchat.conversation import Conversation
from peftchat.errors import UserError
from peftchat.training.row_stats import RowStats
from peftchat.training.truncation import fit

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

_BATCH = 1024
_BATCH_CHARACTERS = 2**21
"""A batch ends here even if it has few dialogues, so that long ones do not fill the memory."""
_WORKERS = 2
"""The tokenizer's threads use all cores by themselves; a second batch keeps them busy while Python has the first."""


def encoded_rows(
    recipe: "Recipe", encoder: RowEncoder, conversations: Iterable[Conversation], stats: RowStats
) -> Iterator[RowBatch]:
    """Batches of rows, in the order of their dialogues.

    Args:
        recipe: says what fits, what is trained and what is refused.
        encoder: of the recipe's format.
        conversations: read while earlier ones are encoded.
        stats: counts what became of each.

    Raises:
        InputError: a dialogue holds what the recipe refuses.
    """
    table = policy_table(recipe.chat.loss_on)
    for batch, rows in _in_flight(encoder, conversations):
        if recipe.chat.special_text == "refuse" and rows.lookalikes.any():
            raise _special_text(rows.sources[int(rows.lookalikes.argmax())])
        if rows.lengths.max() > recipe.data.max_length:
            rows = _fitting(recipe, encoder, batch, rows, stats)
        supervised = rows.counts(table)
        if not supervised.all():
            rows = _learnable(recipe, rows, supervised > 0, stats)
        stats.rows += len(rows)
        stats.tokens += len(rows.ids)
        stats.supervised += int(supervised.sum())
        stats.lookalikes += int(rows.lookalikes.sum())
        yield rows


def _in_flight(
    encoder: RowEncoder, conversations: Iterable[Conversation]
) -> Iterator[tuple[Sequence[Conversation], RowBatch]]:
    """Each batch with its rows, in order, the next ones being read and encoded meanwhile."""
    waiting: deque[tuple[Sequence[Conversation], Future[RowBatch]]] = deque()
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
    recipe: "Recipe", encoder: RowEncoder, batch: Sequence[Conversation], rows: RowBatch, stats: RowStats
) -> RowBatch:
    """The rows that fit, and what is left of the others."""
    limit, policy = recipe.data.max_length, recipe.data.truncation
    kept: list[Row] = []
    for conversation, row in zip(batch, rows, strict=True):
        if len(row.ids) <= limit:
            kept.append(row)
            continue
        if policy == "refuse":
            raise UserError(
                f"the dialogue has {len(row.ids)} tokens, and data.max_length is {limit}",
                where=conversation.source or None,
                cure="Raise data.max_length, or set data.truncation: turns, turns_leading, split or drop.",
            )
        if policy == "drop":
            stats.drop("too_long", conversation.source)
            continue
        fitted = fit(conversation, row, encoder, limit, policy)
        kept += fitted.rows
        if not fitted.rows:
            stats.drop("too_long", conversation.source)
        elif fitted.lost:
            stats.shorten(fitted.lost, conversation.source)
        if len(fitted.rows) > 1:
            stats.divide(len(fitted.rows), conversation.source)
    return RowBatch.of(kept)


def _learnable(recipe: "Recipe", rows: RowBatch, has_targets: npt.NDArray[np.bool_], stats: RowStats) -> RowBatch:
    """The rows that have something to learn."""
    kept: list[Row] = []
    for row, learnable in zip(rows, has_targets, strict=True):
        if learnable:
            kept.append(row)
        elif recipe.chat.empty_rows == "refuse":
            raise UserError(
                f"nothing in the dialogue is trained by chat.loss_on: {recipe.chat.loss_on}",
                where=row.source or None,
                cure="Take the dialogue out, or set chat.empty_rows: drop to leave such rows out.",
            )
        else:
            stats.drop("nothing_to_learn", row.source)
    return RowBatch.of(kept)


def _special_text(source: str) -> UserError:
    return UserError(
        "a message holds text that is spelled like a special token, and chat.special_text is `refuse`",
        where=source or None,
        cure="Take the text out, or set chat.special_text: text to train on it as ordinary text.",
    )
