"""The loss mask: which tokens of an encoded conversation are trained.

Encoding writes one tag per token beside the ids, message by message. A tag is one byte that holds the part of the turn,
the role, whether the turn is the last answer, and whether its record says that it must not be trained. The finished
sequence is never searched for answers or end tokens.

Tags are turned into a mask late, when a batch is built. `chat.loss_on` is then a table of 256 booleans, and the labels
are one look-up. So one encoded and cached dataset serves every value of `chat.loss_on`, and reports can count tokens by
role and part. Importing this loads no library.
"""

from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from peftchat.conversation import ROLES, Role

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from peftchat.chat_template.examples import TokenIds, TokenTags

IGNORE_INDEX = -100
"""The label that PyTorch's cross entropy ignores."""

LossOn = Literal["answers", "answers_and_headers", "last_answer", "everything"]
"""The values of `chat.loss_on`."""


class TurnPart(IntEnum):
    """The part of a turn that a token belongs to."""

    OUTSIDE = 0  # text of the template around the turns: BOS, a default system prompt
    HEADER = 1  # the role token and the text behind it, up to the content
    CONTENT = 2
    END = 3  # the token that ends the turn, with any text between it and the content
    TRAILER = 4  # the text behind the end token within the turn: usually one newline
    REASONING = 5  # of an answer: its reasoning, with the template's text around it
    TOOL_CALL = 6  # of an answer: its calls, with the template's text around them
    PREAMBLE = 7  # text of the template that the model must write before the content, such as an empty reasoning


# A token that spans two parts gets the one that comes first here: what the model must write takes precedence.
_PRECEDENCE = (
    TurnPart.CONTENT, TurnPart.TOOL_CALL, TurnPart.REASONING, TurnPart.PREAMBLE,
    TurnPart.END, TurnPart.HEADER, TurnPart.TRAILER, TurnPart.OUTSIDE,
)  # fmt: skip

_ANSWER_PARTS = (TurnPart.CONTENT, TurnPart.END, TurnPart.REASONING, TurnPart.TOOL_CALL, TurnPart.PREAMBLE)

_PART_MASK = 0b111
_ROLE_SHIFT = 3
_ROLE_MASK = 0b111
_LAST_ANSWER = 1 << 6
_CONTEXT = 1 << 7


def token_tag(part: TurnPart, role: Role | None = None, *, last_answer: bool = False, context: bool = False) -> int:
    """Return the tag of tokens in this part of a turn of this role.

    Args:
        part: the part.
        role: the role; None outside the turns.
        last_answer: whether the turn is the last answer.
        context: whether the record says that the turn must not be trained (`Message.train` is False).
    """
    role_number = 0 if role is None else ROLES.index(role) + 1
    flags = (_LAST_ANSWER if last_answer else 0) | (_CONTEXT if context else 0)
    return int(part) | role_number << _ROLE_SHIFT | flags


def part_of(tag: int) -> TurnPart:
    """Return the part of the turn that a tag holds."""
    return TurnPart(tag & _PART_MASK)


def precedence(tag: int) -> int:
    """Return a tag's rank for a token that spans several parts. The token gets the tag with the lowest rank."""
    return _PRECEDENCE.index(part_of(tag))


def role_of(tag: int) -> Role | None:
    """Return the role that a tag holds, None outside the turns."""
    number = (tag >> _ROLE_SHIFT) & _ROLE_MASK
    return ROLES[number - 1] if number else None


def is_context(tag: int) -> bool:
    """Return whether the record says that the turn must not be trained."""
    return bool(tag & _CONTEXT)


def _is_trained(loss_on: LossOn, tag: int) -> bool:
    if is_context(tag):
        return False
    if loss_on == "everything":
        return True
    role_number = (tag >> _ROLE_SHIFT) & _ROLE_MASK
    if role_number != ROLES.index("assistant") + 1:
        return False
    if loss_on == "answers_and_headers":
        return True
    in_answer = tag & _PART_MASK in _ANSWER_PARTS
    return in_answer and (loss_on == "answers" or bool(tag & _LAST_ANSWER))


def loss_mask_table(loss_on: LossOn) -> "npt.NDArray[np.bool_]":
    """Return for each of the 256 tags whether `loss_on` trains it: bool, shape (256,)."""
    import numpy as np

    return np.array([_is_trained(loss_on, tag) for tag in range(256)])


def labels_for(ids: "TokenIds", tags: "TokenTags", table: "npt.NDArray[np.bool_]") -> "npt.NDArray[np.int64]":
    """Return the labels of one example: the id where the table trains its tag, else `IGNORE_INDEX`.

    Args:
        ids: token ids, int32, shape (T,).
        tags: their tags, uint8, shape (T,).
        table: `loss_mask_table` of the recipe's `chat.loss_on`, bool, shape (256,).

    Returns:
        int64, shape (T,).
    """
    import numpy as np

    return np.where(table[tags], ids.astype(np.int64), IGNORE_INDEX)
