"""OpenAssistant's messages as their exports hold them."""

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from peftchat.conversation import Conversation, Message
from peftchat.conversations.formats.base import (
    Description,
    Fields,
    Format,
    Notes,
    field_names,
    optional_text,
    text_field,
    turn_list,
    type_name,
    validate_messages,
)
from peftchat.conversations.formats.keys import LeftOut, complete, shape_of
from peftchat.conversations.languages import matches_language
from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, ReadOptions, RecordError
from peftchat.conversations.splitting import fingerprint

ExportRole = Literal["prompter", "assistant"]
_ROLES: dict[str, ExportRole] = {"prompter": "prompter", "assistant": "assistant"}


@dataclass(slots=True, eq=False)
class TreeMessage:
    """A message with its replies in export order.

    Attributes:
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
        unused=tuple(name for name, value in fields.items() if name not in _USED and value not in _NOTHING),
    )


_USED = frozenset({"text", "role", "lang", "review_result", "deleted", "synthetic", "rank", "replies"})
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


TreeRule = Literal["tree_not_ready", "prompt_not_reviewed", "prompt_in_other_language"]
PathRule = Literal[
    "prompt_without_reply",
    "path_with_deleted_message",
    "path_with_synthetic_message",
    "open_turn_that_is_not_the_first_reply",
    "reply_ranked_below_top_k",
    "roles_do_not_alternate",
]

RULES: dict[TreeRule | PathRule, str] = {
    "tree_not_ready": "trees whose state is not ready_for_export",
    "prompt_not_reviewed": "trees whose prompt did not pass review",
    "prompt_in_other_language": "trees whose prompt is in another language",
    "prompt_without_reply": "paths that are a prompt and nothing else",
    "path_with_deleted_message": "paths with a deleted message",
    "path_with_synthetic_message": "paths with a message written by a model",
    "open_turn_that_is_not_the_first_reply": "paths that end in a user turn other than its parent's first reply",
    "reply_ranked_below_top_k": "paths with a reply ranked below top_k, or unranked among siblings",
    "roles_do_not_alternate": "paths in which prompter and assistant do not alternate",
}

Path = Sequence[TreeMessage]


def leaf_paths(root: TreeMessage) -> Iterator[list[TreeMessage]]:
    """Every path from the root to a message without replies, depth first in export order."""
    path: list[TreeMessage] = []
    open_messages = [(root, 0)]
    while open_messages:
        message, depth = open_messages.pop()
        del path[depth:]
        path.append(message)
        if not message.replies:
            yield list(path)
        open_messages.extend((reply, depth + 1) for reply in reversed(message.replies))


def without_open_turn(path: Path) -> Path:
    """The path without a user turn at its end, which nobody answered."""
    return path[:-1] if path[-1].role == "prompter" else path


def broken_rule(path: Path, top_k: int | None) -> PathRule | None:
    """The first rule that a root-to-leaf path breaks, None if it becomes a conversation."""
    if len(path) == 1:
        return "prompt_without_reply"
    if any(message.deleted for message in path):
        return "path_with_deleted_message"
    if any(message.synthetic for message in path):
        return "path_with_synthetic_message"
    # Of several open questions below one answer, one stands for the conversation that ends there.
    if path[-1].role == "prompter" and path[-2].replies[0] is not path[-1]:
        return "open_turn_that_is_not_the_first_reply"
    if top_k is not None and not _within_top(path, top_k):
        return "reply_ranked_below_top_k"
    if not alternates(without_open_turn(path)):
        return "roles_do_not_alternate"
    return None


def alternates(path: Path) -> bool:
    """Whether the path goes prompter, assistant, prompter, … and ends with an assistant."""
    roles = ("prompter", "assistant")
    return len(path) % 2 == 0 and all(message.role == roles[i % 2] for i, message in enumerate(path))


def _within_top(path: Path, top_k: int) -> bool:
    for parent, message in pairwise(path):
        if message.role != "assistant":
            continue
        if message.rank is None:
            if len(parent.replies) > 1:
                return False
        elif message.rank >= top_k:
            return False
    return True


_READY = "ready_for_export"


def _is_tree(fields: Fields) -> bool:
    return "message_tree_id" in fields and isinstance(fields.get("prompt"), dict)


def _is_thread(fields: Fields) -> bool:
    return "thread_id" in fields and "thread" in fields


def _is_message(fields: Fields) -> bool:
    return "message_id" in fields and "role" in fields and "text" in fields


def _matches(fields: Fields) -> bool:
    return _is_tree(fields) or _is_thread(fields) or _is_message(fields)


class _Reading:
    """One pass over an export: applies the rules, counts at each of them."""

    def __init__(self, options: ReadOptions, problems: ProblemLog) -> None:
        self.options = options
        self.problems = problems
        self.seen: set[bytes] = set()
        self.told = Notes(problems)

    def tree(self, record: RawRecord) -> Iterator[Conversation]:
        prompt = parse_tree(record.value["prompt"])
        # In a tree export a missing state or verdict is not a good one.
        ready, reviewed = record.value.get("tree_state") == _READY, prompt.reviewed is True
        yield from self.conversations(prompt, record.where, ready=ready, reviewed=reviewed, record=record)

    def thread(self, record: RawRecord) -> Iterator[Conversation]:
        """A thread is a tree without branches; its ranks were given among siblings that are not here."""
        fields = turn_list(record.value, "thread")
        if not fields:
            raise RecordError("no_answer", "the thread is empty")
        path = [parse_message(message) for message in fields]
        for message, entry in zip(path, fields, strict=True):
            message.unused += ("replies",) if entry.get("replies") else ()
        for parent, message in pairwise(path):
            parent.replies.append(message)
        yield from self.conversations(path[0], record.where, reviewed=path[0].reviewed is not False, record=record)

    def conversations(
        self,
        prompt: TreeMessage,
        where: str,
        *,
        ready: bool = True,
        reviewed: bool = True,
        record: RawRecord | None = None,
    ) -> Iterator[Conversation]:
        """The conversations of one tree, each once; `record` is what a quarantine shows of it."""
        notes, skipped = self.problems.notes, self.problems.skipped
        notes["oasst_trees"] += 1
        notes["oasst_messages"] += _tree_size(prompt)
        if rule := self._broken_tree_rule(prompt, ready, reviewed):
            skipped[rule] += 1
            notes[f"oasst_messages_in_{rule}"] += _tree_size(prompt)
            return
        fields: dict[str, Any] = {"lang": prompt.lang} if prompt.lang else {}
        fields |= {} if record is None else {key: value for key, value in record.value.items() if value is not None}
        shape = shape_of(fields, ("prompt", "thread"), all_described=True)
        told: set[str] = {name for message in _all_messages(prompt) for name in message.unused}
        if any(message.lang not in ("", prompt.lang) for message in _all_messages(prompt)):
            told.add("lang")
        for path in leaf_paths(prompt):
            notes["oasst_paths"] += 1
            if broken := broken_rule(path, self.options.oasst_top_k):
                skipped[broken] += 1
                continue
            kept = without_open_turn(path)
            if len(kept) < len(path):
                notes["trailing_user_trimmed"] += 1
            self.told.start(where, is_table=False)
            try:
                conversation = complete(fields, shape, _messages(kept), self.told)
                messages = validate_messages(conversation.messages, self.problems)
            except LeftOut as left_out:
                skipped[left_out.rule] += 1
                continue
            except RecordError as error:
                self.problems.add(Problem(where, error.kind, error.detail), record and record.as_bytes())
                continue
            mark = fingerprint(messages, conversation.tools)
            if mark in self.seen:
                skipped["duplicate"] += 1
                continue
            self.seen.add(mark)
            for name in sorted(told):
                self.told.unused(f"{name} in a message")
            told.clear()
            self.told.finish()
            yield replace(conversation, messages=messages)

    def _broken_tree_rule(self, prompt: TreeMessage, ready: bool, reviewed: bool) -> TreeRule | None:
        if not ready:
            return "tree_not_ready"
        if not reviewed:
            return "prompt_not_reviewed"
        if self.options.languages and not matches_language(prompt.lang, self.options.languages):
            return "prompt_in_other_language"
        return None


def _messages(path: Path) -> list[Message]:
    return [Message("user" if message.role == "prompter" else "assistant", message.text) for message in path]


def _tree_size(root: TreeMessage) -> int:
    count, open_messages = 0, [root]
    while open_messages:
        count += 1
        open_messages.extend(open_messages.pop().replies)
    return count


def _read(records: Iterable[RawRecord], options: ReadOptions, problems: ProblemLog) -> Iterator[Conversation]:
    reading = _Reading(options, problems)
    single = FlatMessages()
    for record in records:
        try:
            if _is_tree(record.value):
                yield from reading.tree(record)
            elif _is_thread(record.value):
                yield from reading.thread(record)
            elif _is_message(record.value):
                single.add(record)
            else:
                raise RecordError("other_format", f"not in oasst format; fields: {field_names(record.value)}")
        except RecordError as error:
            problems.add(Problem(record.where, error.kind, error.detail), record.as_bytes())
    for tree in single.trees(problems):
        ready = tree.state is None or tree.state == _READY
        reviewed = tree.prompt.reviewed is not False
        yield from reading.conversations(tree.prompt, tree.where, ready=ready, reviewed=reviewed)


FORMAT = Format(
    "oasst",
    Description(
        "OpenAssistant exports: trees (message_tree_id, prompt), threads (thread_id, thread), single messages "
        "(message_id)",
        {
            "prompt": "the first message of a tree: text, role, replies, lang, rank, review_result, deleted, synthetic",
            "tree_state": "trees other than ready_for_export are left out",
            "thread": "of a thread: its messages in order",
            "message_id": "of a single message, with parent_id, text, role",
        },
        (
            {
                "message_tree_id": "t1",
                "tree_state": "ready_for_export",
                "prompt": {
                    "text": "Hi",
                    "role": "prompter",
                    "lang": "en",
                    "review_result": True,
                    "replies": [
                        {"text": "Hello!", "role": "assistant", "rank": 0, "replies": []},
                        {"text": "Hey.", "role": "assistant", "rank": 1, "replies": []},
                    ],
                },
            },
            {
                "thread_id": "t2",
                "thread": [{"text": "A hat?", "role": "prompter"}, {"text": "A red one.", "role": "assistant"}],
            },
        ),
    ),
    _matches,
    _read,
    ranked=True,
    fixed_fields=True,
)
