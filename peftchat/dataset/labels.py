"""Labeled answers as pairs of examples: each answer, and another record's answer to the same prompt.

KTO needs the second one for its KL term: how much more likely the model makes answers that have nothing to do with the
prompt (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from peftchat.chat_template.examples import EncodedExample
from peftchat.conversation import Conversation
from peftchat.formatting import format_count, format_decimal

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

_BALANCE = (1.0, 4 / 3)
"""The weight of all good answers over that of all bad ones, as the paper advises it (section 4.2)."""

_SLACK = 1.25
"""By what factor the balance may lie outside before it is told."""


def with_other_answers(labeled: Iterable[Conversation]) -> Iterator[Conversation]:
    """Yield labeled answers as pairs, with the answer of the record before as the rejected one.

    TRL's `KTOTrainer` takes that of the record before it in its batch. The first record gets that of the second, or its
    own where there is no other. Nothing but the last answer is trained.
    """
    stream = iter(labeled)
    first, second = next(stream, None), next(stream, None)
    if first is None:
        return
    yield _pair(first, second or first)
    before = first
    for one in chain(() if second is None else (second,), stream):
        yield _pair(one, before)
        before = one


def _pair(labeled: Conversation, other: Conversation) -> Conversation:
    prompt = tuple(message._replace(train=False) for message in labeled.messages[:-1])
    return replace(labeled, messages=(*prompt, labeled.messages[-1]), rejected=(*prompt, other.messages[-1]))


def labeled_sides(pair: Conversation) -> tuple[Conversation, Conversation]:
    """Return a labeled answer and the other answer as two conversations."""
    return replace(pair, rejected=None), replace(pair, messages=pair.rejected or (), rejected=None)


def cut(example: EncodedExample, longest: int) -> EncodedExample:
    """Return the first tokens of an example. Its prompt is that of an answer that fits, so that targets are left."""
    return replace(example, ids=example.ids[:longest], token_tags=example.token_tags[:longest])


def label_notes(recipe: "Recipe", labels: Sequence[bool]) -> Iterator[str]:
    """Yield what is to be said of the labels that a run is trained on: one kind alone, or weights out of balance."""
    if not labels or recipe.kto is None:
        return
    good = sum(labels)
    bad = len(labels) - good
    if not good or not bad:
        kind = "good" if good else "bad"
        yield f"all {format_count(len(labels))} answers are labeled {kind}; `kto` compares both kinds"
        return
    kto, (least, most) = recipe.kto, _BALANCE
    if not kto.desirable_weight or not kto.undesirable_weight:
        return
    balance = kto.desirable_weight * good / (kto.undesirable_weight * bad)
    if least / _SLACK <= balance <= most * _SLACK:
        return
    counts = f"{format_count(good)} good and {format_count(bad)} bad answers"
    key, weight = "undesirable_weight", kto.desirable_weight * good / (most * bad)
    if balance < least:
        key, weight = "desirable_weight", kto.undesirable_weight * bad / good
    yield f"{counts} weigh {format_decimal(balance)} to 1; the paper advises 1 to 1.33, as with kto.{key}: {weight:.2g}"
