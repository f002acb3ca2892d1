"""The loss mask: which tokens of an encoded conversation are trained.

Encoding writes one tag per token beside the ids, message by message. A tag is one byte that holds the part of the turn,
the role, whether the turn is the last answer, and whether its record says that it must not be trained. The finished
sequence is never searched for answers or end tokens.

Tags are turned into a mask late, when a batch is built. The recipe's `LossPolicy` is then a table of 256 booleans, and
the labels are one look-up. So one encoded and cached dataset serves every policy, and reports can count tokens by role
and part. Importing this loads no library.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class LossPolicy:
    """What a recipe trains: the turns that `loss_on` selects, less the kinds of text that the other keys leave out.

    Attributes:
        loss_on: `chat.loss_on`.
        train_reasoning: `chat.train_reasoning`.
        train_tool_calls: `chat.train_tool_calls`.
        train_empty_reasoning: `chat.train_empty_reasoning`.
    """

    loss_on: LossOn = "answers"
    train_reasoning: bool = True
    train_tool_calls: bool = True
    train_empty_reasoning: bool = True

    def __str__(self) -> str:
        keys = ("train_reasoning", "train_tool_calls", "train_empty_reasoning")
        return ", ".join([self.loss_on, *(f"{key}: false" for key in keys if not getattr(self, key))])

    @property
    def untrained_parts(self) -> frozenset["TurnPart"]:
        """The parts of turns that are context under every `loss_on`."""
        kinds = (
            (TurnPart.REASONING, self.train_reasoning),
            (TurnPart.TOOL_CALL, self.train_tool_calls),
            (TurnPart.EMPTY_REASONING, self.train_empty_reasoning),
        )
        return frozenset(part for part, trained in kinds if not trained)


class TurnPart(IntEnum):
    """The part of a turn that a token belongs to."""

    OUTSIDE = 0  # text of the template around the turns: BOS, a default system prompt
    HEADER = 1  # the role token and the text behind it, up to the content
    CONTENT = 2
    END = 3  # the token that ends the turn, with any text between it and the content
    TRAILER = 4  # the text behind the end token within the turn: usually one newline
    REASONING = 5  # of an answer: its reasoning, with the template's text around it
    TOOL_CALL = 6  # of an answer: its calls, with the template's text around them
    PREAMBLE = 7  # text of the template that the model must write before the content, such as the name of a channel
    EMPTY_REASONING = 8  # of an answer without reasoning: the template's marks around nothing


# A token that spans two parts gets the one that comes first here: what the model must write takes precedence.
_PRECEDENCE = (
    TurnPart.CONTENT, TurnPart.TOOL_CALL, TurnPart.REASONING, TurnPart.PREAMBLE, TurnPart.EMPTY_REASONING,
    TurnPart.END, TurnPart.HEADER, TurnPart.TRAILER, TurnPart.OUTSIDE,
)  # fmt: skip

ANSWER_PARTS = (
    TurnPart.EMPTY_REASONING, TurnPart.REASONING, TurnPart.PREAMBLE,
    TurnPart.CONTENT, TurnPart.TOOL_CALL, TurnPart.END,
)  # fmt: skip
"""The parts of an answer that a model must write."""

_PARTS = len(TurnPart)
_PLACE_MASK = 0b111111  # the number of the role times `_PARTS`, plus the part: below 45
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
    return role_number * _PARTS + int(part) | flags


def part_of(tag: int) -> TurnPart:
    """Return the part of the turn that a tag holds."""
    return TurnPart((tag & _PLACE_MASK) % _PARTS)


def precedence(tag: int) -> int:
    """Return a tag's rank for a token that spans several parts. The token gets the tag with the lowest rank."""
    return _PRECEDENCE.index(part_of(tag))


def role_of(tag: int) -> Role | None:
    """Return the role that a tag holds, None outside the turns."""
    number = (tag & _PLACE_MASK) // _PARTS
    return ROLES[number - 1] if 0 < number <= len(ROLES) else None


def is_context(tag: int) -> bool:
    """Return whether the record says that the turn must not be trained."""
    return bool(tag & _CONTEXT)


def is_last_answer(tag: int) -> bool:
    """Return whether the turn is the last answer."""
    return bool(tag & _LAST_ANSWER)


def _is_trained(policy: LossPolicy, tag: int) -> bool:
    if is_context(tag) or part_of(tag) in policy.untrained_parts:
        return False
    if policy.loss_on == "everything":
        return True
    if role_of(tag) != "assistant":
        return False
    if policy.loss_on == "answers_and_headers":
        return True
    return part_of(tag) in ANSWER_PARTS and (policy.loss_on == "answers" or bool(tag & _LAST_ANSWER))


def loss_mask_table(policy: LossPolicy | LossOn) -> "npt.NDArray[np.bool_]":
    """Return for each of the 256 tags whether the policy trains it: bool, shape (256,).

    Args:
        policy: the policy, or a `loss_on` with the defaults of the other keys.
    """
    import numpy as np

    policy = policy if isinstance(policy, LossPolicy) else LossPolicy(policy)
    return np.array([_is_trained(policy, tag) for tag in range(256)])


def text_table() -> "npt.NDArray[np.bool_]":
    """Return for each of the 256 tags whether it is of text that a turn says, and not of its header or its end.

    bool, shape (256,).
    """
    import numpy as np

    around = (TurnPart.OUTSIDE, TurnPart.HEADER, TurnPart.END, TurnPart.TRAILER)
    return np.array([part_of(tag) not in around for tag in range(256)])


TARGET_KINDS: dict[str, tuple[TurnPart, ...]] = {
    "content": (TurnPart.CONTENT,),
    "reasoning": (TurnPart.REASONING,),
    "tool_calls": (TurnPart.TOOL_CALL,),
    "other": tuple(part for part in TurnPart if part not in (TurnPart.CONTENT, TurnPart.REASONING, TurnPart.TOOL_CALL)),
}
"""The kinds of trained text whose loss is told apart: `other` is end tokens and marks of the template."""


def target_kind_table() -> "npt.NDArray[np.int64]":
    """Return for each of the 256 tags the number of its kind in `TARGET_KINDS`: int64, shape (256,)."""
    import numpy as np

    kinds = {part: number for number, parts in enumerate(TARGET_KINDS.values()) for part in parts}
    return np.array([kinds[part_of(tag)] for tag in range(256)])


def turn_numbers(tags: "TokenTags") -> "npt.NDArray[np.int64]":
    """Return the number of each token's turn among the turns of its role, from 1 on: int64, shape (T,).

    A turn begins where the role changes, at a header, and behind an end.
    """
    import numpy as np

    places = tags.astype(np.int64) & _PLACE_MASK
    roles, parts = places // _PARTS, places % _PARTS
    is_end = np.isin(parts, (TurnPart.END, TurnPart.TRAILER))
    starts = np.ones(len(tags), dtype=bool)
    starts[1:] = (
        (roles[1:] != roles[:-1])
        | ((parts[1:] == TurnPart.HEADER) & (parts[:-1] != TurnPart.HEADER))
        | (is_end[:-1] & ~is_end[1:])
    )
    numbers = np.zeros(len(tags), dtype=np.int64)
    for role in np.unique(roles):
        of_role = roles == role
        numbers[of_role] = np.cumsum(starts & of_role)[of_role]
    return numbers


def labels_for(ids: "TokenIds", tags: "TokenTags", table: "npt.NDArray[np.bool_]") -> "npt.NDArray[np.int64]":
    """Return the labels of one example: the id where the table trains its tag, else `IGNORE_INDEX`.

    Args:
        ids: token ids, int32, shape (T,).
        tags: their tags, uint8, shape (T,).
        table: `loss_mask_table` of the recipe's policy, bool, shape (256,).

    Returns:
        int64, shape (T,).
    """
    import numpy as np

    return np.where(table[tags], ids.astype(np.int64), IGNORE_INDEX)
