"""What the statistics say, as plain data."""

from dataclasses import asdict, dataclass, field
from typing import Any

from peftchat.sources.problems import Kind
from peftchat.sources.stats.lengths import LengthSketch

EXAMPLES = 3
"""How many examples of each finding are kept."""


@dataclass(slots=True)
class RoleCount:
    """The messages of one role."""

    messages: int = 0
    characters: int = 0


@dataclass(frozen=True, slots=True)
class LongRow:
    """One of the longest dialogues; `tokens` is None where no tokenizer was given."""

    where: str
    characters: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class LanguageCount:
    """Languages of a random sample: ISO 639 code -> dialogues, most frequent first."""

    sampled: int
    found: dict[str, int]


@dataclass(slots=True)
class PartStats:
    """One file, folder or side of a recipe.

    Attributes:
        name: of the part.
        forms: input file -> form it was read as.
        rows: rows read.
        dialogues: usable ones; all that follows counts these.
        turns: messages a dialogue.
        characters: a dialogue.
        tokens: of the messages of a dialogue, without those of a template; None without a tokenizer.
        roles: messages and characters by role.
        longest: the longest dialogues.
        languages: None where no detector is installed.
        with_code: dialogues with a fenced block.
        code_characters: characters inside fenced blocks.
        exact_duplicates: dialogues that repeat an earlier one of the part word for word.
        near_duplicates: dialogues that nearly repeat an earlier, different one of the part; None where the MinHash
            library is not installed.
        duplicate_examples: (place, place of the earlier one).
        near_examples: the same for near duplicates.
        problems: rows that cannot be used, by kind.
        problem_examples: the first of each kind, as `file:line: detail`.
        skipped: rows left out by rule.
        notes: rows that were changed.
    """

    name: str
    forms: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    dialogues: int = 0
    turns: LengthSketch = field(default_factory=LengthSketch)
    characters: LengthSketch = field(default_factory=LengthSketch)
    tokens: LengthSketch | None = None
    roles: dict[str, RoleCount] = field(default_factory=dict)
    longest: tuple[LongRow, ...] = ()
    languages: LanguageCount | None = None
    with_code: int = 0
    code_characters: int = 0
    exact_duplicates: int = 0
    near_duplicates: int | None = None
    duplicate_examples: list[tuple[str, str]] = field(default_factory=list)
    near_examples: list[tuple[str, str]] = field(default_factory=list)
    problems: dict[Kind, int] = field(default_factory=dict)
    problem_examples: dict[Kind, list[str]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def code_share(self) -> float:
        """The share of the characters that stands in fenced blocks."""
        return self.code_characters / self.characters.total if self.characters.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with quantiles and histograms in place of the sketches."""
        lengths = {"turns": self.turns, "characters": self.characters, "tokens": self.tokens}
        plain = {name: value for name, value in asdict(self).items() if name not in lengths}
        plain["code_share"] = round(self.code_share, 4)
        for name, sketch in lengths.items():
            plain[name] = None if sketch is None else {**sketch.as_dict(), "histogram": sketch.histogram()}
        return plain


@dataclass(slots=True)
class Overlap:
    """What two parts have in common; for train and eval all of it is a leak.

    Attributes:
        first: the part that was given first.
        second: the other one; the counts are of its dialogues.
        same: dialogues that are in both word for word.
        same_start: dialogues whose first user message also starts one of the other part; the same ones included.
        near: dialogues that are nearly the same as one of the other part, the same ones not included; None where the
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
        dialogues: that hold one.
        examples: (place of the dialogue, place of the question).
    """

    path: str
    questions: int
    found: int
    dialogues: int
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
