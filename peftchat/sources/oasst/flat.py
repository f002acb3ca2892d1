"""Trees put together again from an export of single messages."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass

from peftchat.sources.forms.turns import optional_text, text_field
from peftchat.sources.oasst.message import TreeMessage, parse_message
from peftchat.sources.problems import Problem, ProblemLog, RowError
from peftchat.sources.row import Row


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

    def add(self, row: Row) -> None:
        """Keep one message.

        Raises:
            RowError: it cannot be parsed, or its id was there before.
        """
        key = text_field(row.value, "message_id")
        if key in self._found:
            raise RowError("broken_tree", f"message id {key[:80]!r} was there before, at {self._found[key].where}")
        state, parent = row.value.get("tree_state"), optional_text(row.value, "parent_id") or None
        self._found[key] = _Found(row.where, parent, state, parse_message(row.value))

    def trees(self, problems: ProblemLog) -> Iterator[FlatTree]:
        """The trees in order of their prompts, replies in order of their rows.

        Messages that no prompt leads to (a lost parent, a circle) are problems.
        """
        found = self._found
        for entry in found.values():
            if entry.parent in found:
                found[entry.parent].message.replies.append(entry.message)
        rooted: set[int] = set()
        for entry in found.values():
            if entry.parent is None:
                rooted.update(map(id, _all_messages(entry.message)))
                yield FlatTree(entry.where, entry.state, entry.message)
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
