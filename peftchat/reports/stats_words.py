"""Statistics of dialogues in words: what terminal and page both say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftchat.conversations.dataset_card import SKIPPED
from peftchat.conversations.problems import KINDS
from peftchat.conversations.stats import BenchmarkOverlap, DataStats, Overlap, PartStats
from peftchat.conversations.stats.result import LengthSketch
from peftchat.formatting import format_count, format_percent

_NO_HYGIENE = "not looked for (pip install 'peftchat[hygiene]')"
_NO_DETECTOR = "not detected (pip install 'peftchat[languages]')"
_MOST_LANGUAGES = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to look at, with places."""

    text: str
    examples: tuple[str, ...]


def facts_of(part: PartStats) -> Iterator[tuple[str, str]]:
    """One part, a line a fact: name, value."""
    yield "form", ", ".join(sorted(set(part.forms.values()))) or "none"
    yield "rows", format_count(part.rows)
    yield "dialogues", format_count(part.dialogues)
    for name, sketch in (("turns", part.turns), ("characters", part.characters), ("tokens", part.tokens)):
        if sketch is not None:
            yield name, _lengths(sketch)
    for role, tally in part.roles.items():
        yield (
            f"{role} turns",
            f"{format_count(tally.messages)}, {_mean(tally.characters, tally.messages)} characters each",
        )
    yield "languages", _languages(part)
    with_code = format_percent(part.with_code / part.dialogues if part.dialogues else 0.0)
    yield "code", f"in {with_code} of the dialogues, {format_percent(part.code_share)} of the characters"
    yield "exact duplicates", _of(part.exact_duplicates, part.dialogues)
    near = part.near_duplicates
    yield "near duplicates", _NO_HYGIENE if near is None else _of(near, part.dialogues)
    yield "unusable rows", _of(sum(part.problems.values()), part.rows)


def findings_of(part: PartStats) -> Iterator[Finding]:
    """What is worth a look in one part."""
    for kind, number in part.problems.items():
        yield Finding(f"unusable, {format_count(number)}: {KINDS[kind]}", tuple(part.problem_examples[kind]))
    for rule, number in part.skipped.items():
        yield Finding(f"{format_count(number)} left out: {SKIPPED.get(rule, rule.replace('_', ' '))}", ())
    if part.exact_duplicates:
        yield Finding(
            f"{format_count(part.exact_duplicates)} repeat an earlier dialogue", _pairs(part.duplicate_examples)
        )
    if part.near_duplicates:
        yield Finding(
            f"{format_count(part.near_duplicates)} nearly repeat an earlier dialogue", _pairs(part.near_examples)
        )


def overlap_words(overlap: Overlap) -> str:
    """What two parts share, in one sentence."""
    if not (overlap.same or overlap.same_start or overlap.near):
        return f"nothing of {overlap.first} is in {overlap.second}"
    near = "" if overlap.near is None else f", {format_count(overlap.near)} nearly the same"
    return (
        f"{overlap.second} shares with {overlap.first}: {format_count(overlap.same)} dialogues word for word{near}, "
        f"{format_count(overlap.same_start)} with the same first user message"
    )


def benchmark_words(benchmark: BenchmarkOverlap) -> str:
    """What of a benchmark stands in the data, in one sentence."""
    where = f"{benchmark.path}: {format_count(benchmark.found)} of {format_count(benchmark.questions)} questions found"
    dialogues = "1 dialogue" if benchmark.dialogues == 1 else f"{format_count(benchmark.dialogues)} dialogues"
    return f"{where}, in {dialogues}" if benchmark.found else where


def leaks(stats: DataStats) -> Iterator[Finding]:
    """Overlaps between parts and with benchmarks."""
    for overlap in stats.overlaps:
        yield Finding(overlap_words(overlap), _pairs(overlap.examples))
    for benchmark in stats.benchmarks:
        yield Finding(benchmark_words(benchmark), _pairs(benchmark.examples))


def _pairs(examples: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{later}, as {earlier}" for later, earlier in examples)


def _lengths(sketch: LengthSketch) -> str:
    if not sketch.count:
        return "none"
    return (
        f"{format_count(sketch.total)}; a dialogue {format_count(sketch.smallest)} to {format_count(sketch.largest)}, "
        f"half of them up to {format_count(sketch.quantile(0.5))}, 95 % up to {format_count(sketch.quantile(0.95))}"
    )


def _mean(total: int, number: int) -> str:
    return format_count(total / number) if number else "0"


def _of(number: int, all_of_them: int) -> str:
    return f"{format_count(number)} ({format_percent(number / all_of_them)})" if number and all_of_them else "none"


def _languages(part: PartStats) -> str:
    if part.languages is None:
        return _NO_DETECTOR
    found = list(part.languages.found.items())
    sampled = part.languages.sampled
    if not sampled:
        return "none"
    named = ", ".join(f"{code} {format_percent(number / sampled)}" for code, number in found[:_MOST_LANGUAGES])
    rest = f", {len(found) - _MOST_LANGUAGES} more" if len(found) > _MOST_LANGUAGES else ""
    return f"{named}{rest} (of {format_count(sampled)} looked at)"
