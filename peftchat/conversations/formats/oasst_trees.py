"""OpenAssistant's messages and trees, as their exports hold them."""

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
        unused: names of its fields, and of those below it, that are not read.
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
    train: bool | None
    unused: dict[str, None]
    replies: list["TreeMessage"] = field(default_factory=list)


_READ = frozenset(
    {
        *("text", "role", "lang", "review_result", "deleted", "synthetic", "rank", "replies"),
        *("message_id", "parent_id", "message_tree_id", "tree_state"),
        *(*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS),
    }
)


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
        unused={
            f"{name} in a message": None
            for name, value in fields.items()
            if name not in _READ and value not in (None, "", [], {})
        },
    )


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
        for reply in message.replies:
            root.unused |= reply.unused
        open_messages.extend(zip(message.replies, replies, strict=True))
    return root


@dataclass(frozen=True, slots=True)
class FlatTree:
    """A tree found among single messages.

    Attributes:
        where: the place of its prompt.
        state: the tree's state, None where the export does not carry it.
        columns: what describes the tree.
    """

    where: str
    state: str | None
    columns: dict[str, Any]
    prompt: TreeMessage


@dataclass(frozen=True, slots=True)
class _Found:
    where: str
    parent: str | None
    state: str | None
    tree: str | None
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
        tree = record.value.get("message_tree_id")
        self._found[key] = _Found(record.where, parent, state, tree, parse_message(record.value))

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
                for message in _all_messages(entry.message):
                    rooted.add(id(message))
                    entry.message.unused |= message.unused
                columns = {"message_tree_id": entry.tree, "tree_state": entry.state}
                yield FlatTree(entry.where, entry.state, columns, entry.message)
        for entry in found.values():
            if id(entry.message) not in rooted:
                parent = reprlib.repr(entry.parent)
                detail = f"no prompt leads to this message: its parent {parent} is missing or in a circle"
                text = entry.message.text.encode(errors="backslashreplace")
                problems.add(Problem(entry.where, "broken_tree", detail), text)


def _all_messages(root: TreeMessage) -> Iterator[TreeMessage]:
    open_messages = [root]
    while open_messages:
        message = open_messages.pop()
        yield message
        open_messages.extend(message.replies)
