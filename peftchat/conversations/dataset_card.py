"""The dataset card: how many records were read, kept, changed and left out, and why."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self, get_args

from peftchat.conversation import Conversation
from peftchat.conversations.formats.oasst import RULES, TreeRule
from peftchat.conversations.formats.oasst_pairs import PAIR_RULES
from peftchat.conversations.problems import KINDS, NOTES, Kind, ProblemLog

SKIPPED: dict[str, str] = {
    **{str(rule): meaning for rule, meaning in RULES.items()},
    **{str(rule): meaning for rule, meaning in PAIR_RULES.items()},
    "label_is_false": "records whose label says false",
    "flagged_not_to_train": "records flagged not to be trained",
    "answer_cut_off": "answers that were cut off, as their `finish_reason` says",
    "answers_tie": "records in which no answer has a better score than another",
    "left_out_by_weight": "conversations left out by the weight of their source",
    "other_language": "conversations in another language",
    "max_train_samples": "conversations behind `data.max_train_samples`",
    "max_eval_samples": "conversations behind `data.max_eval_samples`",
    "duplicate": "conversations that were there before, word for word",
}
"""Rule -> what it leaves out, as card and table say it."""


class SizeOf(NamedTuple):
    """How much is in one conversation."""

    messages: int
    answers: int
    characters: int

    @classmethod
    def of(cls, conversation: Conversation) -> Self:
        """Count what is in a conversation."""
        answers = characters = 0
        for message in conversation.messages:
            answers += message.role == "assistant"
            characters += len(message.content)
        return cls(len(conversation.messages), answers, characters)


@dataclass(slots=True)
class SplitCount:
    """How much is in one of the written files."""

    conversations: int = 0
    messages: int = 0
    answers: int = 0
    characters: int = 0

    def add(self, size: SizeOf) -> None:
        """Count one conversation."""
        self.conversations += 1
        self.messages += size.messages
        self.answers += size.answers
        self.characters += size.characters

    def include(self, other: "SplitCount") -> None:
        """Count what another has counted."""
        self.conversations += other.conversations
        self.messages += other.messages
        self.answers += other.answers
        self.characters += other.characters


@dataclass(slots=True)
class Card:
    """The counts of one preparation.

    Attributes:
        source: the path or hub id as given.
        settings: what was asked for.
        formats: input file -> format it was read as.
        records: records read.
        oasst: messages, trees and paths of OpenAssistant exports; empty for other formats.
        problems: records in quarantine by kind.
        examples: the first problems of each kind, as `file:line: detail`.
        skipped: what was left out by rule.
        unused: fields that nothing is trained on -> the records that have them, and the first of these.
        changed: records that were changed, by kind of change.
        trimmed: conversations that lost a user turn at their end.
        train: what `train.jsonl` holds.
        eval: what `eval.jsonl` holds.
        remarks: what a user should know about the data, in sentences.
        stopped_early: whether `max_samples` ended the reading.
        seconds: wall time.
        peftchat: version that wrote this.
    """

    source: str
    settings: dict[str, Any]
    peftchat: str
    formats: dict[str, str] = field(default_factory=dict)
    records: int = 0
    oasst: dict[str, int] = field(default_factory=dict)
    problems: dict[Kind, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    unused: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    trimmed: int = 0
    train: SplitCount = field(default_factory=SplitCount)
    eval: SplitCount = field(default_factory=SplitCount)
    remarks: list[str] = field(default_factory=list)
    stopped_early: bool = False
    seconds: float = 0.0

    def take(self, log: ProblemLog) -> None:
        """Fill in what the log of the reading counted."""
        self.formats = dict(log.formats)
        self.records = log.records
        self.oasst = {name: count for name, count in log.notes.items() if name.startswith("oasst_")}
        self.problems = {kind: log.problems[kind] for kind in KINDS if kind in log.problems}
        self.examples = {kind: [str(problem) for problem in log.examples[kind]] for kind in self.problems}
        self.skipped = {rule: log.skipped[rule] for rule in SKIPPED if rule in log.skipped}
        self.unused = {name: asdict(use) for name, use in log.unused.items()}
        self.changed = {name: log.notes[name] for name in NOTES if log.notes[name]}
        self.trimmed = log.notes["trailing_user_trimmed"]
        self.remarks += log.sentences()

    def as_dict(self) -> dict[str, Any]:
        """The card as plain data, for `card.json` and `--json`."""
        return asdict(self)


def funnel(card: Card) -> Iterator[tuple[str, int]]:
    """The way from records to conversations, a line a step: what, how many."""
    yield "records read", card.records
    yield from _oasst_steps(card.oasst, card.skipped)
    for kind, count in card.problems.items():
        if kind == "broken_file":
            yield "files whose rest was not read, however much it is", count
        else:
            yield f"in quarantine: {KINDS[kind]}", -count
    for rule, count in card.skipped.items():
        if rule not in get_args(TreeRule):
            yield f"left out: {SKIPPED[rule]}", -count
    for name, count in card.changed.items():
        yield f"changed: {NOTES[name]}", count
    for name, use in card.unused.items():
        yield f"not used: the field {printable_name(name)} (first {use['first']})", use["records"]
    unit = "conversations"
    if card.settings.get("pairs") or card.settings.get("labels"):
        unit = "pairs" if card.settings.get("pairs") else "labeled answers"
    yield f"{unit} in train.jsonl", card.train.conversations
    yield f"{unit} in eval.jsonl", card.eval.conversations


def printable_name(name: str) -> str:
    """A field's name for a table; names may hold anything."""
    return repr(name) if name.isprintable() else ascii(name)


def _oasst_steps(oasst: Mapping[str, int], skipped: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    if not oasst:
        return
    yield "messages in them", oasst["oasst_messages"]
    yield "message trees or threads", oasst["oasst_trees"]
    for rule in get_args(TreeRule):
        if rule in skipped:
            messages = oasst[f"oasst_messages_in_{rule}"]
            yield f"left out: {RULES[rule]} (with {messages:,} messages)", -skipped[rule]
    if "oasst_prompts" in oasst:
        yield "prompts with replies in the trees that are left", oasst["oasst_prompts"]
        yield "pairs of ranked replies to them", oasst["oasst_pairs"]
    else:
        yield "paths from prompt to last reply in the trees that are left", oasst.get("oasst_paths", 0)


def card_text(card: Card) -> str:
    """The card as Markdown."""
    lines = [f"# Data from {card.source}", ""]
    lines += [f"Read as {data_format}: `{file}`" for file, data_format in card.formats.items()]
    lines += ["", "| step | count |", "| --- | ---: |"]
    lines += [f"| {what} | {count:,} |" for what, count in funnel(card)]
    lines += ["", "| file | conversations | messages | answers | characters |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, side in (("train.jsonl", card.train), ("eval.jsonl", card.eval)):
        lines.append(
            f"| {name} | {side.conversations:,} | {side.messages:,} | {side.answers:,} | {side.characters:,} |"
        )
    lines += ["", "Conversations that start with the same user message are in the same file.", ""]
    lines += [f"- {remark}" for remark in card.remarks]
    lines += ["", "Settings:", ""]
    lines += [f"- {name}: {value}" for name, value in card.settings.items()]
    if card.stopped_early:
        lines += ["", "The reading stopped at `max_samples`: the source holds more than is counted here."]
    if card.examples:
        lines += ["", "First problems of each kind (all of them are in `quarantine.jsonl`):", ""]
        lines += [f"- {example}" for examples in card.examples.values() for example in examples]
    return "\n".join([*lines, ""])
