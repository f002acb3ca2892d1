"""OpenAssistant exports: which paths through their trees become conversations, or preference pairs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from peftchat.conversation import Conversation, Message, Role
from peftchat.conversations.formats.base import (
    Description,
    Fields,
    Format,
    Notes,
    field_names,
    turn_list,
    validate_messages,
)
from peftchat.conversations.formats.keys import LeftOut, complete, shape_of
from peftchat.conversations.formats.oasst_pairs import broken_prompt_rule, paths_to_prompts, ranked_pairs
from peftchat.conversations.formats.oasst_trees import (
    ExportRole,
    FlatMessages,
    TreeMessage,
    all_messages,
    all_paths,
    parse_message,
    parse_tree,
    within_top,
)
from peftchat.conversations.formats.pairs import of_rejected, unpaired
from peftchat.conversations.languages import matches_language
from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, ReadOptions, RecordError
from peftchat.conversations.splitting import conversation_fingerprint

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
    return (path for path in all_paths(root) if not path[-1].replies)


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
    if top_k is not None and not within_top(path, top_k):
        return "reply_ranked_below_top_k"
    if not alternates(without_open_turn(path)):
        return "roles_do_not_alternate"
    return None


def alternates(path: Path) -> bool:
    """Whether the path goes prompter, assistant, prompter, … and ends with an assistant."""
    roles = ("prompter", "assistant")
    return len(path) % 2 == 0 and all(message.role == roles[i % 2] for i, message in enumerate(path))


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
        if self.options.pairs or self.options.labels:
            raise RecordError("missing_field", "a thread has one reply to each prompt, and a preference pair needs two")
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
        shape = shape_of(fields, ("prompt",) if _is_tree(fields) else ("thread",), all_described=True)
        told: set[str] = {name for message in all_messages(prompt) for name in message.unused}
        if any(message.lang not in ("", prompt.lang) for message in all_messages(prompt)):
            told.add("lang")
        for kept, rejected in self._pairs(prompt) if self.options.pairs or self.options.labels else self._paths(prompt):
            self.told.start(where, is_table=False)
            try:
                conversation = complete(fields, shape, _messages(kept), self.told)
                messages = validate_messages(conversation.messages, self.problems)
                if rejected is not None:
                    with of_rejected():
                        others = validate_messages(_messages(rejected), self.problems)
                    conversation = replace(conversation, rejected=others)
            except LeftOut as left_out:
                skipped[left_out.rule] += 1
                continue
            except RecordError as error:
                self.problems.add(Problem(where, error.kind, error.detail), record and record.as_bytes())
                continue
            conversation = replace(conversation, messages=messages)
            mark = conversation_fingerprint(conversation)
            if mark in self.seen:
                skipped["duplicate"] += 1
                continue
            self.seen.add(mark)
            for name in sorted(told):
                self.told.unused(f"{name} in a message")
            told.clear()
            self.told.finish()
            if self.options.labels and conversation.rejected is not None:
                yield from unpaired(conversation)
            else:
                yield conversation

    def _paths(self, prompt: TreeMessage) -> Iterator[tuple[Path, None]]:
        """The paths of a tree that become conversations; no path is rejected for them."""
        notes, skipped = self.problems.notes, self.problems.skipped
        for path in leaf_paths(prompt):
            notes["oasst_paths"] += 1
            if broken := broken_rule(path, self.options.oasst_top_k):
                skipped[broken] += 1
                continue
            kept = without_open_turn(path)
            if len(kept) < len(path):
                notes["trailing_user_trimmed"] += 1
            yield kept, None

    def _pairs(self, prompt: TreeMessage) -> Iterator[tuple[Path, Path]]:
        """The paths of a tree that end with a chosen reply, each with that of the rejected one."""
        notes, skipped, top_k = self.problems.notes, self.problems.skipped, self.options.oasst_top_k
        for path in paths_to_prompts(prompt):
            notes["oasst_prompts"] += 1
            if broken := broken_prompt_rule(path, top_k):
                skipped[broken] += 1
                continue
            pairs = ranked_pairs(path[-1], self.options.oasst_pairs or "best_worst", top_k)
            if not pairs:
                skipped["prompt_without_ranked_replies"] += 1
            notes["oasst_pairs"] += len(pairs)
            for chosen, rejected in pairs:
                if chosen.text == rejected.text:
                    skipped["replies_of_equal_text"] += 1
                else:
                    yield [*path, chosen], [*path, rejected]

    def _broken_tree_rule(self, prompt: TreeMessage, ready: bool, reviewed: bool) -> TreeRule | None:
        if not ready:
            return "tree_not_ready"
        if not reviewed:
            return "prompt_not_reviewed"
        if self.options.languages and not matches_language(prompt.lang, self.options.languages):
            return "prompt_in_other_language"
        return None


def _messages(path: Path) -> list[Message]:
    roles: dict[ExportRole, Role] = {"prompter": "user", "assistant": "assistant"}
    return [Message(roles[message.role], message.text, train=message.train) for message in path]


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
        "(message_id); objectives with pairs compare ranked replies",
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
