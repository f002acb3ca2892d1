"""Many lengths in little memory: counts on a logarithmic scale."""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from peftchat.conversations.problems import Kind

_GROWTH = 1.02
_LOG_GROWTH = math.log(_GROWTH)
_QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
_EXACT_BELOW = 50
"""Below this each length has a bin of its own: bins of 2 % would be narrower than 1."""


@dataclass(slots=True)
class LengthSketch:
    """Mean and extremes exactly, quantiles to 1 %, whatever the number of values.

    The idea is that of DDSketch (Masson, Rim and Lee, 2019): bins whose borders grow by a constant factor.
    """

    count: int = 0
    total: int = 0
    smallest: int = 0
    largest: int = 0
    _bins: Counter[int] = field(default_factory=Counter)

    def add(self, value: int) -> None:
        """Count one length, 0 or more."""
        self.smallest = value if not self.count else min(self.smallest, value)
        self.largest = max(self.largest, value)
        self.count += 1
        self.total += value
        self._bins[_bin_of(value)] += 1

    @property
    def mean(self) -> float:
        """The mean, 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int:
        """The length that `share` of the values (0 to 1) do not exceed."""
        rank = share * (self.count - 1)
        seen = 0
        for number in sorted(self._bins):
            seen += self._bins[number]
            if seen > rank:
                return min(max(_middle(number), self.smallest), self.largest)
        return self.largest

    def as_dict(self) -> dict[str, float]:
        """Count, total, mean, extremes and quantiles."""
        summary = {
            "count": self.count,
            "total": self.total,
            "mean": round(self.mean, 2),
            "min": self.smallest,
            "max": self.largest,
        }
        return {**summary, **{name: self.quantile(share) for name, share in _QUANTILES.items()}}

    def histogram(self, most_bars: int = 24) -> list[tuple[int, int, int]]:
        """Bars as (first length, last length, count): one a length where there are few, else of equal ratio.

        Bars without a value between others are kept, so that gaps show. Borders are exact to 2 %.
        """
        if not self.count:
            return []
        if self.largest - self.smallest < most_bars and self.largest < _EXACT_BELOW:
            return [(length, length, self._bins[length]) for length in range(self.smallest, self.largest + 1)]
        ratio = (self.largest + 1) / max(1, self.smallest)
        edges = {math.ceil(max(1, self.smallest) * ratio ** (bar / most_bars)) for bar in range(1, most_bars)}
        firsts = sorted({self.smallest, *(edge for edge in edges if edge <= self.largest)})
        counts: Counter[int] = Counter()
        for number, count in self._bins.items():
            length = min(max(_middle(number), self.smallest), self.largest)
            counts[bisect_right(firsts, length) - 1] += count
        lasts = [first - 1 for first in firsts[1:]] + [self.largest]
        return [(first, last, counts[bar]) for bar, (first, last) in enumerate(zip(firsts, lasts, strict=True))]


def _bin_of(value: int) -> int:
    # The logarithmic bin of 50 has the number 197, so the two kinds never meet.
    return value if value < _EXACT_BELOW else math.floor(math.log(value) / _LOG_GROWTH)


def _middle(number: int) -> int:
    return number if number < _EXACT_BELOW else round(_GROWTH ** (number + 0.5))


EXAMPLES = 3
"""How many examples of each finding are kept."""


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
