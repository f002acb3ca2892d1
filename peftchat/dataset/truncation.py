"""Conversations that are too long, cut between exchanges and nowhere else.

An exchange is what one user message sets off: the message, the answer, and tool calls and results in between. Every
row made here is the encoding of a shorter conversation, so that no answer is ever without its end token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample
from peftchat.conversation import Conversation, Message

TruncationSide = Literal["turns", "turns_leading", "split"]

Round = tuple[Message, ...]

_AROUND = 12


@dataclass(frozen=True, slots=True)
class Truncated:
    """A conversation made to fit.

    Attributes:
        rows: its rows; none if not even one exchange fits.
        lost: exchanges that are in none of them.
    """

    rows: tuple[EncodedExample, ...]
    lost: int


def rounds(conversation: Conversation) -> tuple[Round, list[Round]]:
    """The system message, if there is one, and the exchanges, the last of which may lack its answer."""
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
    conversation: Conversation, whole: EncodedExample, encoder: ChatEncoder, limit: int, cut: TruncationSide
) -> Truncated:
    """The conversation in rows of at most `limit` tokens, each with the system message.

    Args:
        conversation: one that is too long.
        whole: its row.
        encoder: of the chat format.
        limit: most tokens in a row.
        cut: `turns` keeps the first exchanges, `turns_leading` the last ones; `split` keeps all in several rows and
            loses only exchanges that are too long by themselves.
    """
    system, parts = rounds(conversation)
    room = limit * _size(conversation.messages) / len(whole.ids) - _size(system)

    def row_of(some: Sequence[Round]) -> EncodedExample | None:
        messages = [message for exchange in some for message in exchange]
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if not messages:
            return None
        row = encoder.encode([replace(conversation, messages=(*system, *messages))])[0]
        return row if len(row.ids) <= limit else None

    if cut == "split":
        return _split(parts, row_of, room)
    if cut == "turns":
        kept, row = _longest(len(parts), lambda count: row_of(parts[:count]), _guess(parts, room))
    else:
        guess = _guess(parts[::-1], room)
        kept, row = _longest(len(parts), lambda count: row_of(parts[len(parts) - count :]), guess)
    return Truncated(() if row is None else (row,), len(parts) - kept)


def _split(
    parts: Sequence[Round], row_of: Callable[[Sequence[Round]], EncodedExample | None], room: float
) -> Truncated:
    """As few rows of neighboring exchanges as possible."""
    rows: list[EncodedExample] = []
    start = lost = 0
    while start < len(parts):
        rest = parts[start:]
        kept, row = _longest(len(rest), lambda count, rest=rest: row_of(rest[:count]), _guess(rest, room))  # type: ignore[misc]
        if row is None:
            lost += 1
            start += 1
        else:
            rows.append(row)
            start += kept
    return Truncated(tuple(rows), lost)


def _longest(
    most: int, row_of: Callable[[int], EncodedExample | None], guess: int
) -> tuple[int, EncodedExample | None]:
    """The largest number of exchanges, up to `most`, of which a row can be made, and that row; 0 and None if none.

    Every try encodes a conversation, so the search begins at a guess and widens from there.
    """
    kept: tuple[int, EncodedExample | None] = (0, None)
    low, high = 0, most + 1  # so many fit, and so many do not
    count, step = min(max(guess, 1), most), 1
    while high - low > 1:
        row = row_of(count)
        if row is None:
            high = count
        else:
            low, kept = count, (count, row)
        if high > most:
            count = min(low + step, most)
        elif not low:
            count = max(high - step, 1)
        else:
            count = (low + high) // 2
        step *= 2
    return kept


def _guess(parts: Sequence[Round], room: float) -> int:
    """How many of the first exchanges have the size that there is room for."""
    return sum(size <= room for size in accumulate(map(_size, parts)))


def _size(messages: Sequence[Message]) -> int:
    """About how long the messages are, in characters; what is around a message counts for a few."""
    return sum(len(message.content) + _AROUND for message in messages)
