"""OpenAssistant's messages and trees, as their exports hold them."""

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from peftchat.conversations.formats import names
from peftchat.conversations.formats.base import optional_text, text_field, type_name
from peftchat.conversations.formats.turns import parse_flag
from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, RecordError

ExportRole = Literal["prompter", "assistant"]
_ROLES: dict[str, ExportRole] = {"prompter": "prompter", "assistant": "assistant"}


@dataclass(slots=True, eq=False)
class TreeMessage:
    """A message with its replies in export order.

    Attributes:
        train: False makes an answer context.
        unused: the other fields that the export has for it.
        rank: place among its siblings by people's votes, 0 the best; None where nobody ranked.
        reviewed: the reviewers' verdict; None where the export does not say.
    """

    text: str
    role: ExportRole
    lang: str
    reviewed: bool | None
    deleted: bool
    synthetic: bool
    rank: int | None
    train: bool | None = None
    unused: tuple[str, ...] = ()
    replies: list["TreeMessage"] = field(default_factory=list)


def parse_message(fields: Mapping[str, Any]) -> TreeMessage:
    """One message without its replies.

    Raises:
        RecordError: text, role or rank are not what the export format says.
    """
    name = text_field(fields, "role")
    role = _ROLES.get(name)
    if role is None:
        raise RecordError("unknown_role", f"unknown role {reprlib.repr(name)}; OpenAssistant's are prompter, assistant")
    rank = fields.get("rank")
    # A column with gaps comes out of pandas as floats, the gaps as NaN.
    if isinstance(rank, float):
        rank = None if math.isnan(rank) else int(rank) if rank.is_integer() else rank
    if rank is not None and type(rank) is not int:
        raise RecordError("wrong_type", f"'rank' must be a whole number, it is {type_name(rank)}")
    return TreeMessage(
        text=text_field(fields, "text"),
        role=role,
        lang=str(fields.get("lang") or ""),
        reviewed=fields.get("review_result"),
        deleted=bool(fields.get("deleted")),
        synthetic=bool(fields.get("synthetic")),
        rank=rank,
        train=parse_flag(fields, "a message"),
        unused=tuple(name for name, value in fields.items() if name not in _USED and value not in _NOTHING),
    )


_USED = frozenset(
    {
        *("text", "role", "lang", "review_result", "deleted", "synthetic", "rank", "replies"),
        *(*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS),
    }
)
_OF_FLAT = frozenset({"message_id", "parent_id", "tree_state"})
"""Fields that make trees out of single messages."""
_NOTHING: tuple[Any, ...] = (None, "", [], {})


def parse_tree(prompt: Mapping[str, Any]) -> TreeMessage:
    """A message and, through `replies`, everything below it.

    Raises:
        RecordError: a message below it cannot be parsed.
    """
    root = parse_message(prompt)
    open_messages = [(root, prompt)]
    while open_messages:
        message, fields = open_messages.pop()
        replies = fields.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise RecordError("wrong_type", f"'replies' must be a list of messages, it is {type_name(replies)}")
        message.replies = [parse_message(reply) for reply in replies]
        open_messages.extend(zip(message.replies, replies, strict=True))
    return root


@dataclass(frozen=True, slots=True)
class FlatTree:
    """A tree found among single messages.

    Attributes:
        where: the place of its prompt.
        state: the tree's state, None where the export does not carry it.
    """

    where: str
    state: str | None
    prompt: TreeMessage


@dataclass(frozen=True, slots=True)
class _Found:
    where: str
    parent: str | None
    state: str | None
    message: TreeMessage


class FlatMessages:
    """Single messages, collected until the file ends: a reply may come before its parent."""

    def __init__(self) -> None:
        self._found: dict[str, _Found] = {}

    def add(self, record: RawRecord) -> None:
        """Keep one message.

        Raises:
            RecordError: it cannot be parsed, or its id was there before.
        """
        key = text_field(record.value, "message_id")
        if key in self._found:
            raise RecordError("broken_tree", f"message id {key[:80]!r} was there before, at {self._found[key].where}")
        state, parent = record.value.get("tree_state"), optional_text(record.value, "parent_id") or None
        message = parse_message(record.value)
        message.unused = tuple(name for name in message.unused if name not in _OF_FLAT)
        message.unused += ("replies",) if record.value.get("replies") else ()
        self._found[key] = _Found(record.where, parent, state, message)

    def trees(self, problems: ProblemLog) -> Iterator[FlatTree]:
        """The trees in order of their prompts, replies in order of their records.

        Messages that no prompt leads to (a lost parent, a circle) are problems.
        """
        found = self._found
        for entry in found.values():
            if entry.parent in found:
                found[entry.parent].message.replies.append(entry.message)
        rooted: set[int] = set()
        for entry in found.values():
            if entry.parent is None:
                rooted.update(map(id, all_messages(entry.message)))
                yield FlatTree(entry.where, entry.state, entry.message)
        for entry in found.values():
            if id(entry.message) not in rooted:
                parent = reprlib.repr(entry.parent)
                detail = f"no prompt leads to this message: its parent {parent} is missing or in a circle"
                text = entry.message.text.encode(errors="backslashreplace")
                problems.add(Problem(entry.where, "broken_tree", detail), text)


def within_top(path: Sequence[TreeMessage], top_k: int) -> bool:
    """Whether each answer of a path is among its parent's best `top_k` replies, or the only one."""
    for parent, message in pairwise(path):
        if message.role != "assistant":
            continue
        if message.rank is None:
            if len(parent.replies) > 1:
                return False
        elif message.rank >= top_k:
            return False
    return True


def all_paths(root: TreeMessage) -> Iterator[list[TreeMessage]]:
    """Every path from the root to a message, depth first in export order."""
    path: list[TreeMessage] = []
    open_messages = [(root, 0)]
    while open_messages:
        message, depth = open_messages.pop()
        del path[depth:]
        path.append(message)
        yield list(path)
        open_messages.extend((reply, depth + 1) for reply in reversed(message.replies))


def all_messages(root: TreeMessage) -> Iterator[TreeMessage]:
    """Yield a message and everything below it."""
    open_messages = [root]
    while open_messages:
        message = open_messages.pop()
        yield message
        open_messages.extend(message.replies)
