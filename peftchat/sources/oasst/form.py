"""OpenAssistant exports: message trees, threads, and single messages."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

from peftchat.conversation import Conversation, Message
from peftchat.sources.fingerprint import fingerprint
from peftchat.sources.forms.form import Fields, Form
from peftchat.sources.forms.turns import checked, field_names, turn_list
from peftchat.sources.languages import matches_language
from peftchat.sources.oasst.flat import FlatMessages
from peftchat.sources.oasst.message import TreeMessage, parse_message, parse_tree
from peftchat.sources.oasst.rules import Path, TreeRule, broken_rule, leaf_paths, without_open_turn
from peftchat.sources.options import ReadOptions
from peftchat.sources.problems import Problem, ProblemLog, RowError
from peftchat.sources.row import Row

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

    def tree(self, row: Row) -> Iterator[Conversation]:
        prompt = parse_tree(row.value["prompt"])
        # In a tree export a missing state or verdict is not a good one.
        ready, reviewed = row.value.get("tree_state") == _READY, prompt.reviewed is True
        yield from self.dialogues(prompt, row.where, ready=ready, reviewed=reviewed, row=row)

    def thread(self, row: Row) -> Iterator[Conversation]:
        """A thread is a tree without branches; its ranks were given among siblings that are not here."""
        fields = turn_list(row.value, "thread")
        if not fields:
            raise RowError("no_answer", "the thread is empty")
        path = [parse_message(message) for message in fields]
        for parent, message in pairwise(path):
            parent.replies.append(message)
        yield from self.dialogues(path[0], row.where, reviewed=path[0].reviewed is not False, row=row)

    def dialogues(
        self,
        prompt: TreeMessage,
        where: str,
        *,
        ready: bool = True,
        reviewed: bool = True,
        row: Row | None = None,
    ) -> Iterator[Conversation]:
        """The dialogues of one tree, each once; `row` is what a quarantine shows of it."""
        notes, skipped = self.problems.notes, self.problems.skipped
        notes["oasst_trees"] += 1
        notes["oasst_messages"] += _size(prompt)
        if rule := self._broken_tree_rule(prompt, ready, reviewed):
            skipped[rule] += 1
            notes[f"oasst_messages_in_{rule}"] += _size(prompt)
            return
        for path in leaf_paths(prompt):
            notes["oasst_paths"] += 1
            if broken := broken_rule(path, self.options.top_k):
                skipped[broken] += 1
                continue
            kept = without_open_turn(path)
            if len(kept) < len(path):
                notes["trailing_user_trimmed"] += 1
            try:
                messages = checked(_messages(kept), self.problems)
            except RowError as error:
                self.problems.add(Problem(where, error.kind, error.detail), row and row.as_bytes())
                continue
            mark = fingerprint(messages)
            if mark in self.seen:
                skipped["duplicate"] += 1
                continue
            self.seen.add(mark)
            yield Conversation(messages, where)

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


def _size(root: TreeMessage) -> int:
    count, open_messages = 0, [root]
    while open_messages:
        count += 1
        open_messages.extend(open_messages.pop().replies)
    return count


def _read(rows: Iterable[Row], options: ReadOptions, problems: ProblemLog) -> Iterator[Conversation]:
    reading = _Reading(options, problems)
    single = FlatMessages()
    for row in rows:
        try:
            if _is_tree(row.value):
                yield from reading.tree(row)
            elif _is_thread(row.value):
                yield from reading.thread(row)
            elif _is_message(row.value):
                single.add(row)
            else:
                raise RowError("other_form", f"not in oasst form; fields: {field_names(row.value)}")
        except RowError as error:
            problems.add(Problem(row.where, error.kind, error.detail), row.as_bytes())
    for tree in single.trees(problems):
        ready = tree.state is None or tree.state == _READY
        reviewed = tree.prompt.reviewed is not False
        yield from reading.dialogues(tree.prompt, tree.where, ready=ready, reviewed=reviewed)


FORM = Form(
    "oasst",
    "OpenAssistant exports: trees (message_tree_id, prompt), threads (thread_id, thread), single messages (message_id)",
    _matches,
    _read,
    ranked=True,
)
