"""Preference pairs as examples: two per pair, chosen before rejected, with the prompt as context; and their batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample, ExampleBatch
from peftchat.chat_template.loss_mask import IGNORE_INDEX, loss_mask_table
from peftchat.conversation import Conversation, Message
from peftchat.dataset.collator import Batch, ChatCollator, cu_seqlens
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
        # An answer to another record's prompt is not trained.
        trained = slice(None, None, 2 if has_labels else 1)
        stats.examples += len(made) // 2
        stats.tokens += int(made.lengths[trained].sum())
        stats.supervised += int(made.counts(loss_mask)[trained].sum())
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


_FEWEST_SHARED = 32
"""Tokens of a prompt that are worth an attention of its own for the rejected answer."""


def shared_tokens(chosen: EncodedExample, rejected: EncodedExample, loss_mask: npt.NDArray[np.bool_]) -> int:
    """Return how many first tokens of a pair are worth sharing; the last one before a target is each answer's own.

    Args:
        chosen: one answer behind the prompt.
        rejected: the other one.
        loss_mask: whether each kind of token is trained.
    """
    number = min(len(chosen.ids), len(rejected.ids))
    differs = np.flatnonzero(chosen.ids[:number] != rejected.ids[:number])
    before_targets = (int(np.argmax(loss_mask[one.token_tags[1:]])) for one in (chosen, rejected))
    number = min(int(differs[0]) if len(differs) else number, *before_targets)
    return number if number >= _FEWEST_SHARED else 0


class PairCollator(ChatCollator):
    """Lays out pairs as `ChatCollator` lays out packs; the examples of a batch are chosen, rejected, chosen, …

    With the layout `padded`, each answer has a row of its own. With `varlen`, a rejected answer can go on from the
    tokens that it shares with the chosen one, which are then in the line once.

    Attributes:
        shares_prompts: whether it does; the attention must know such lines.
    """

    shares_prompts = False

    def __call__(self, packs: Sequence[Mapping[str, Sequence[int]]]) -> Batch:
        """Return the batch of some pairs, each of which lists its two examples under `examples`."""
        pairs = len(packs)
        if self.layout == "padded":
            packs = [{"examples": [index]} for pack in packs for index in pack["examples"]]
        # Rows of their own or not, the answers of a pair stay together where a batch is cut.
        return {**super().__call__(packs), "pack_sizes": np.full(pairs, 2, dtype=np.int64)}

    def collate(self, packs: Sequence[Sequence[EncodedExample]]) -> Batch:
        """Return the batch of these packs."""
        if self.layout != "varlen" or not self.shares_prompts:
            return super().collate(packs)
        shared = [shared_tokens(chosen, rejected, self._loss_mask) for chosen, rejected in packs]
        batch = super().collate(
            [[chosen, _without(rejected, number)] for (chosen, rejected), number in zip(packs, shared, strict=True)]
        )
        ends = batch["cu_seq_lens_q"].tolist()
        for place, number in enumerate(shared):
            start, stop = ends[2 * place + 1 : 2 * place + 3]
            batch["position_ids"][0, start:stop] += number
            batch["attended_pairs"] += number * (stop - start)
        lengths = np.diff(ends).tolist()
        before = [number for each in shared for number in (0, each)]
        return batch | cu_seqlens(lengths, before + [0] * (len(lengths) - len(before)))


def _without(example: EncodedExample, number: int) -> EncodedExample:
    """Return an example without its first tokens."""
    return replace(example, ids=example.ids[number:], token_tags=example.token_tags[number:])


class LabelCollator(PairCollator):
    """Lays out labeled answers, and apart from them, under `others`, the other answers to their prompts.

    `examples` and `target_counts` list both in turn. Everything else is of the answers, which alone are trained.
    """

    def __call__(self, packs: Sequence[Mapping[str, Sequence[int]]]) -> Batch:
        """Return the batch of some answers, each of which lists its two examples under `examples`."""
        answers, others = (
            ChatCollator.__call__(self, [{"examples": [pack["examples"][place]]} for pack in packs])
            for place in range(2)
        )
        both = {key: np.stack([answers[key], others[key]], axis=1).flatten() for key in ("examples", "target_counts")}
        return {**answers, **both, "pack_sizes": np.full(len(packs), 2, dtype=np.int64), "others": others}

    def keep_first(self, batch: Batch, count: int) -> Batch:
        """Return a batch with its first answers alone; with none, it has no targets."""
        kept = super().keep_first(batch, count)
        if not count:
            kept["others"]["labels"].fill_(IGNORE_INDEX)
        return kept
