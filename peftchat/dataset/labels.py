"""Labeled answers as pairs of examples: each answer, and another record's answer to the same prompt.

KTO needs the second one for its KL term: how much more likely the model makes answers that have nothing to do with the
prompt (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from peftchat.chat_template.examples import EncodedExample
from peftchat.conversation import Conversation


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
