"""Preference pairs as examples: two per pair, chosen before rejected, with the prompt as context; and their batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample, ExampleBatch
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.conversation import Conversation, Message
from peftchat.dataset.collator import Batch, ChatCollator
from peftchat.dataset.encode import EncodingStats, encode_ahead, special_token_text
from peftchat.dataset.labels import cut, labeled_sides, with_other_answers
from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

SIDES: tuple[str, str] = ("chosen", "rejected")
"""The two answers of a pair, in the order of their examples."""

LABELED_SIDES: tuple[str, str] = ("answer", "other")
"""A labeled answer, and another record's answer to its prompt, which is never trained."""


def sides(pair: Conversation) -> tuple[Conversation, Conversation]:
    """Return a pair as two conversations in which nothing is trained before the turn at which they part."""
    shared = pair.shared_turns
    prompt = tuple(message._replace(train=False) for message in pair.messages[:shared])

    def side(messages: tuple[Message, ...]) -> Conversation:
        return replace(pair, messages=(*prompt, *messages[shared:]), rejected=None)

    return side(pair.messages), side(pair.rejected or ())


def encode_pairs(
    recipe: "Recipe", encoder: ChatEncoder, pairs: Iterable[Conversation], stats: EncodingStats
) -> Iterator[ExampleBatch]:
    """Yield batches with the two examples of each pair, in the order of the pairs.

    A pair is left out as a whole, and `stats.examples` counts pairs. A labeled answer is one as well
    (`peftchat.dataset.labels`), and `stats.labels` has the label of each that is kept. The arguments are those of
    `peftchat.dataset.encode.encode_conversations`.

    Raises:
        UserError: a pair has something that the recipe makes an error.
    """
    loss_mask, has_labels = loss_mask_table(recipe.chat.loss_policy), recipe.has_labels
    pairs = with_other_answers(pairs) if has_labels else pairs
    sides_of = labeled_sides if has_labels else sides

    def encode(batch: Sequence[Conversation]) -> ExampleBatch:
        return encoder.batch([side for pair in batch for side in sides_of(pair)])

    for batch, examples in encode_ahead(encoder, pairs, encode):
        found: list[list[EncodedExample]] = [[] for _ in range(2 * len(batch))]
        for number, of_side in examples.by_conversation():
            found[number] = of_side
        kept: list[EncodedExample] = []
        for number, pair in enumerate(batch):
            if encoder.missing_roles:
                stats.count_roles(sides_of(pair), encoder.missing_roles, recipe.chat.unsupported_roles)
            both = [_trained(of_side, loss_mask) for of_side in found[2 * number : 2 * number + 2]]
            if has_labels:
                both[1] = [cut(example, recipe.data.max_length) for example in both[1]]
            reason = _left_out(recipe, both, pair.source)
            if reason is not None:
                stats.count_dropped(reason, pair.source)
                continue
            kept += [example for of_side in both for example in of_side]
            if has_labels:
                stats.labels.append(bool(pair.label))
        made = ExampleBatch.of(kept)
        if recipe.chat.special_token_text == "error" and made.special_token_text.any():
            raise special_token_text(made.sources[int(made.special_token_text.argmax())])
        stats.examples += len(made) // 2
        stats.tokens += len(made.ids)
        stats.supervised += int(made.counts(loss_mask).sum())
        stats.special_token_text += int(made.special_token_text.sum())
        yield made


def _trained(examples: Sequence[EncodedExample], loss_mask: npt.NDArray[np.bool_]) -> list[EncodedExample]:
    """Return the examples with a target; a template that rewrites earlier turns makes one of each answer."""
    return [example for example in examples if loss_mask[example.token_tags[1:]].any()]


def _left_out(recipe: "Recipe", both: Sequence[Sequence[EncodedExample]], source: str) -> str | None:
    """Return why a pair is left out, None if it is not.

    Raises:
        UserError: the recipe makes the reason an error.
    """
    if not all(both):
        if recipe.chat.untrainable_examples == "error":
            raise UserError(
                f"an answer of the pair has no token to train on by chat.loss_on: {recipe.chat.loss_policy}",
                where=source or None,
                hint="Remove the pair, or set chat.untrainable_examples: drop.",
            )
        return "nothing_to_learn"
    if any(len(examples) > 1 for examples in both):
        return "pairs_whose_answers_become_several_examples"
    (chosen,), (rejected,) = both
    longest = max(len(chosen.ids), len(rejected.ids))
    if longest > recipe.data.max_length:
        if recipe.data.truncation == "error":
            raise UserError(
                f"the pair has an answer that ends at {longest} tokens, and data.max_length is "
                f"{recipe.data.max_length}",
                where=source or None,
                hint="Raise data.max_length, or set data.truncation: drop.",
            )
        return "too_long"
    is_pair = not recipe.has_labels
    return "identical_answers" if is_pair and np.array_equal(chosen.ids, rejected.ids) else None


def pair_packs(examples: int) -> list[list[int]]:
    """Return the packs of a store with two examples for each pair: each pair for itself."""
    return [[first, first + 1] for first in range(0, examples, 2)]


class PairCollator(ChatCollator):
    """Lays out pairs as `ChatCollator` lays out packs; the examples of a batch are chosen, rejected, chosen, …

    With the layout `padded`, each answer has a row of its own.
    """

    def __call__(self, packs: Sequence[Mapping[str, Sequence[int]]]) -> Batch:
        """Return the batch of some pairs, each of which lists its two examples under `examples`."""
        if self.layout == "padded":
            packs = [{"examples": [index]} for pack in packs for index in pack["examples"]]
        return super().__call__(packs)
