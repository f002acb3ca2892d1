"""What each token of a row is, in one byte, and which of them a policy trains.

Encoding writes one code a token beside the ids; nothing is ever searched for in the finished sequence. A policy
is a table over the 256 codes, so labels are one look-up, and the policy can change without encoding again.
"""

from enum import IntEnum
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from peftchat.conversation import ROLES, Role

IGNORE_INDEX = -100
"""The label that PyTorch's cross entropy skips."""

LossOn = Literal["answers", "answers_and_headers", "last_answer", "everything"]
POLICIES: tuple[LossOn, ...] = get_args(LossOn)

TokenTags = npt.NDArray[np.uint8]
TokenIds = npt.NDArray[np.int32]


class TurnPart(IntEnum):
    """The part of a turn that a token belongs to."""

    OUTSIDE = 0  # what a template writes around the turns: BOS, a default system prompt
    HEADER = 1  # the role token and what follows it, up to the content
    CONTENT = 2
    END = 3  # the token that ends the turn, with any text between it and the content
    TRAILER = 4  # what follows the end token within the turn: usually one newline


# A token that straddles two parts belongs to the one that comes first here: what the model must write wins.
_PRECEDENCE = (TurnPart.CONTENT, TurnPart.END, TurnPart.HEADER, TurnPart.TRAILER, TurnPart.OUTSIDE)

_ROLE_SHIFT = 3
_LAST_ANSWER = 1 << 6


def token_tag(part: TurnPart, role: Role | None = None, *, last_answer: bool = False) -> int:
    """The byte for a token of this part of a turn of this role."""
    role_number = 0 if role is None else ROLES.index(role) + 1
    return int(part) | role_number << _ROLE_SHIFT | (_LAST_ANSWER if last_answer else 0)


def part_of(value: int) -> TurnPart:
    """The part that a code stands for."""
    return TurnPart(value & 0b111)


def rank(value: int) -> int:
    """The place of a code's part among those that claim a token which straddles several; the lowest gets it."""
    return _PRECEDENCE.index(part_of(value))


def role_of(value: int) -> Role | None:
    """The role that a code stands for; None outside the turns."""
    number = (value >> _ROLE_SHIFT) & 0b111
    return ROLES[number - 1] if number else None


def _trains(policy: LossOn, value: int) -> bool:
    if policy == "everything":
        return True
    number = (value >> _ROLE_SHIFT) & 0b111
    if number != ROLES.index("assistant") + 1:
        return False
    if policy == "answers_and_headers":
        return True
    inside = value & 0b111 in (TurnPart.CONTENT, TurnPart.END)
    return inside and (policy == "answers" or bool(value & _LAST_ANSWER))


def loss_mask_table(policy: LossOn) -> npt.NDArray[np.bool_]:
    """Which of the 256 codes the policy trains: bool, shape (256,)."""
    return np.array([_trains(policy, value) for value in range(256)])


def labels_for(ids: TokenIds, codes: TokenTags, table: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Labels of one row: the id where the table trains its code, `IGNORE_INDEX` elsewhere.

    Args:
        ids: token ids, int32, shape (T,).
        codes: their codes, uint8, shape (T,).
        table: a policy's table, bool, shape (256,).

    Returns:
        int64, shape (T,).
    """
    return np.where(table[codes], ids.astype(np.int64), IGNORE_INDEX)
