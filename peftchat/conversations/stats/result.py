"""What the statistics of data say: parts, overlaps, benchmarks."""

from dataclasses import asdict, dataclass, field
from typing import Any

from peftchat.conversations.problems import Kind
from peftchat.conversations.stats.lengths import EXAMPLES, LengthSketch
from peftchat.conversations.stats.pairs import PairStats


@dataclass(slots=True)
class RoleCount:
    """The messages of one role."""

    messages: int = 0
    characters: int = 0


@dataclass(frozen=True, slots=True)
class LongConversation:
    """One of the longest conversations; `tokens` is None where no tokenizer was given."""

    where: str
    characters: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class LanguageCount:
    """Languages of a random sample: ISO 639 code -> conversations, most frequent first."""

    sampled: int
    found: dict[str, int]


@dataclass(slots=True)
class PartStats:
    """One file, folder or side of a recipe.

    Attributes:
        name: of the part.
        formats: input file -> format it was read as.
        records: records read.
        conversations: usable ones; all that follows counts these.
        turns: messages a conversation.
        characters: a conversation.
        tokens: of the messages of a conversation, without those of a template; None without a tokenizer.
        roles: messages and characters by role.
        longest: the longest conversations.
        languages: None where no detector is installed.
        with_code: conversations with a fenced block.
        code_characters: characters inside fenced blocks.
        exact_duplicates: conversations that repeat an earlier one of the part word for word.
        near_duplicates: conversations that nearly repeat an earlier, different one of the part; None where the MinHash
            library is not installed.
        duplicate_examples: (place, place of the earlier one).
        near_examples: the same for near duplicates.
        problems: rows that cannot be used, by kind.
        problem_examples: the first of each kind, as `file:line: detail`.
        pairs: of preference pairs, what both answers have; None for conversations.
        labels: of labeled answers, how many are good and bad; None for others.
        skipped: rows left out by rule.
        notes: rows that were changed.
        unused: fields that are not used -> the rows that have them, and the first of these.
        remarks: what else a user should know about the data, in sentences.
    """

    name: str
    formats: dict[str, str] = field(default_factory=dict)
    records: int = 0
    conversations: int = 0
    turns: LengthSketch = field(default_factory=LengthSketch)
    characters: LengthSketch = field(default_factory=LengthSketch)
    tokens: LengthSketch | None = None
    roles: dict[str, RoleCount] = field(default_factory=dict)
    longest: tuple[LongConversation, ...] = ()
    languages: LanguageCount | None = None
    with_code: int = 0
    code_characters: int = 0
    exact_duplicates: int = 0
    near_duplicates: int | None = None
    duplicate_examples: list[tuple[str, str]] = field(default_factory=list)
    near_examples: list[tuple[str, str]] = field(default_factory=list)
    problems: dict[Kind, int] = field(default_factory=dict)
    problem_examples: dict[Kind, list[str]] = field(default_factory=dict)
    pairs: PairStats | None = None
    labels: dict[str, int] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def code_share(self) -> float:
        """The share of the characters that stands in fenced blocks."""
        return self.code_characters / self.characters.total if self.characters.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with quantiles and histograms in place of the sketches."""
        lengths = {"turns": self.turns, "characters": self.characters, "tokens": self.tokens}
        plain = {name: value for name, value in asdict(self).items() if name not in lengths}
        plain["pairs"] = None if self.pairs is None else self.pairs.as_dict()
        plain["code_share"] = round(self.code_share, 4)
        for name, sketch in lengths.items():
            plain[name] = None if sketch is None else {**sketch.as_dict(), "histogram": sketch.histogram()}
        return plain


@dataclass(slots=True)
class Overlap:
    """What two parts have in common; for train and eval all of it is a leak.

    Attributes:
        first: the part that was given first.
        second: the other one; the counts are of its conversations.
        same: conversations that are in both word for word.
        same_start: conversations whose first user message also starts one of the other part; the same ones included.
        near: conversations that are nearly the same as one of the other part, the same ones not included; None where
            the
            MinHash library is not installed.
        examples: (place in the second, place in the first).
    """

    first: str
    second: str
    same: int = 0
    same_start: int = 0
    near: int | None = None
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add_example(self, second: str, first: str) -> None:
        """Keep a pair of places if there are few yet."""
        if len(self.examples) < EXAMPLES:
            self.examples.append((second, first))


@dataclass(frozen=True, slots=True)
class BenchmarkOverlap:
    """Questions of a benchmark that stand in the data.

    Attributes:
        path: of the benchmark.
        questions: in it.
        found: of them in the data.
        conversations: that hold one.
        examples: (place of the conversation, place of the question).
    """

    path: str
    questions: int
    found: int
    conversations: int
    examples: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class DataStats:
    """Everything: parts, overlaps of each pair of parts, benchmarks."""

    parts: list[PartStats]
    overlaps: list[Overlap]
    benchmarks: list[BenchmarkOverlap]
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return {
            "parts": [part.as_dict() for part in self.parts],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "benchmarks": [asdict(benchmark) for benchmark in self.benchmarks],
            "seconds": self.seconds,
        }
