"""Truncation: conversations that are too long, cut between rounds only.

A round is a user message with everything up to the next one: the answer, and tool calls and results in between. Every
example made here is the encoding of a shorter conversation, so no answer lacks its end token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.message_text import message_text
from peftchat.conversation import Conversation, Message

TruncationSide = Literal["turns", "drop_first_turns", "split"]

Round = tuple[Message, ...]

Examples = tuple[EncodedExample, ...]
"""The examples of one conversation: several where the template rewrites earlier turns."""

_CHARACTERS_AROUND = 12
"""Characters that a template adds around a message, about."""


@dataclass(frozen=True, slots=True)
class Truncated:
    """A conversation cut to fit.

    Attributes:
        examples: its examples; none if not even one round fits.
        lost: number of rounds that are in none of them.
    """

    examples: tuple[EncodedExample, ...]
    lost: int


def rounds(conversation: Conversation) -> tuple[Round, list[Round]]:
    """Return the system message, if any, and the rounds; the last round may lack its answer."""
    messages = conversation.messages
    start = 1 if messages and messages[0].role == "system" else 0
    found: list[list[Message]] = []
    answered = True
    for message in messages[start:]:
        if not found or (message.role == "user" and answered):
            found.append([])
            answered = False
        found[-1].append(message)
        answered = answered or message.role == "assistant"
    return messages[:start], [tuple(one) for one in found]


def truncate_to_fit(
    conversation: Conversation, full_length: int, encoder: ChatEncoder, limit: int, cut: TruncationSide
) -> Truncated:
    """Return the conversation as examples of at most `limit` tokens, each with the system message.

    Args:
        conversation: a conversation that is too long.
        full_length: tokens of its longest example.
        encoder: encodes the shorter conversations.
        limit: most tokens of an example.
        cut: `turns` keeps the first rounds, `drop_first_turns` the last ones. `split` keeps all of them in several
            examples, and loses only rounds that are too long by themselves.
    """
    system, parts = rounds(conversation)
    space = limit * _size(conversation.messages) / full_length - _size(system)

    def encode(kept: Sequence[Round]) -> Examples | None:
        messages = [message for part in kept for message in part]
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if not messages:
            return None
        examples = encoder.encode([replace(conversation, messages=(*system, *messages))])
        return tuple(examples) if all(len(example.ids) <= limit for example in examples) else None

    if cut == "split":
        return _split(parts, encode, space)
    if cut == "turns":
        kept, examples = _longest(len(parts), lambda count: encode(parts[:count]), _guess(parts, space))
    else:
        guess = _guess(parts[::-1], space)
        kept, examples = _longest(len(parts), lambda count: encode(parts[len(parts) - count :]), guess)
    return Truncated(examples or (), len(parts) - kept)


def _split(parts: Sequence[Round], encode: Callable[[Sequence[Round]], Examples | None], space: float) -> Truncated:
    """Return as few examples of neighboring rounds as possible."""
    examples: list[EncodedExample] = []
    start = lost = 0
    while start < len(parts):
        rest = parts[start:]
        kept, found = _longest(len(rest), lambda count, rest=rest: encode(rest[:count]), _guess(rest, space))  # type: ignore[misc]
        if found is None:
            lost += 1
            start += 1
        else:
            examples += found
            start += kept
    return Truncated(tuple(examples), lost)


def _longest(most: int, encode: Callable[[int], Examples | None], guess: int) -> tuple[int, Examples | None]:
    """Return the largest number of rounds, up to `most`, that fit, and their examples; 0 and None if none fits.

    Every attempt encodes a conversation, so the search begins at a guess and widens from there.
    """
    best: tuple[int, Examples | None] = (0, None)
    low, high = 0, most + 1  # low rounds fit, and high do not
    count, step = min(max(guess, 1), most), 1
    while high - low > 1:
        examples = encode(count)
        if examples is None:
            high = count
        else:
            low, best = count, (count, examples)
        if high > most:
            count = min(low + step, most)
        elif not low:
            count = max(high - step, 1)
        else:
            count = (low + high) // 2
        step *= 2
    return best


def _guess(parts: Sequence[Round], space: float) -> int:
    """Guess how many of the first rounds fit, by their size."""
    return sum(size <= space for size in accumulate(map(_size, parts)))


def _size(messages: Sequence[Message]) -> int:
    """Return about how long the messages are, in characters, with what a template adds around them."""
    return sum(len(message_text(message)) + _CHARACTERS_AROUND for message in messages)
