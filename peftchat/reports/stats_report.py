"""Dataset statistics in the terminal and as an HTML page."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.conversations.dataset_card import SKIPPED, printable_name
from peftchat.conversations.problems import KINDS, NOTES
from peftchat.conversations.stats import BenchmarkOverlap, DataStats, Overlap, PartStats
from peftchat.conversations.stats.lengths import LengthSketch
from peftchat.conversations.stats.pairs import PairStats
from peftchat.formatting import format_count, format_percent
from peftchat.reports.mask import escape_control_chars
from peftchat.reports.page import write_page
from peftchat.reports.svg import Bar, bar_plot

_NO_HYGIENE = "not checked (pip install 'peftchat[hygiene]')"
_NO_DETECTOR = "not detected (pip install 'peftchat[languages]')"
_MOST_LANGUAGES = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem in the data, with sources of examples."""

    text: str
    examples: tuple[str, ...]


def describe_part(part: PartStats) -> Iterator[tuple[str, str]]:
    """Yield the statistics of one part: name and value."""
    yield "format", ", ".join(sorted(set(part.formats.values()))) or "none"
    yield "records", format_count(part.records)
    yield "conversations", format_count(part.conversations)
    for name, sketch in (("turns", part.turns), ("characters", part.characters), ("tokens", part.tokens)):
        if sketch is not None:
            yield name, _lengths(sketch)
    for role, tally in part.roles.items():
        yield (
            f"{role} turns",
            f"{format_count(tally.messages)}, {_mean(tally.characters, tally.messages)} characters each",
        )
    if part.pairs is not None:
        yield from _describe_pairs(part.pairs)
    if part.labels is not None:
        yield "labels", ", ".join(f"{format_count(number)} {name}" for name, number in part.labels.items())
    yield "languages", _languages(part)
    with_code = format_percent(part.with_code / part.conversations if part.conversations else 0.0)
    yield "code", f"in {with_code} of the conversations, {format_percent(part.code_share)} of the characters"
    yield "exact duplicates", _of(part.exact_duplicates, part.conversations)
    near = part.near_duplicates
    yield "near duplicates", _NO_HYGIENE if near is None else _of(near, part.conversations)
    yield "invalid records", _of(sum(part.problems.values()), part.records)


def _describe_pairs(pairs: PairStats) -> Iterator[tuple[str, str]]:
    """Yield what is told of pairs. Above, their conversations are those with the chosen answer."""
    yield "pairs", format_count(pairs.pairs)
    yield "chosen answers", f"characters {_lengths(pairs.chosen)}"
    yield "rejected answers", f"characters {_lengths(pairs.rejected)}"
    shorter = pairs.pairs - pairs.chosen_longer - pairs.same_length
    yield (
        "longer answer",
        f"the chosen one in {_of(pairs.chosen_longer, pairs.pairs)}, the rejected one in {_of(shorter, pairs.pairs)}",
    )
    yield "shared prompt", f"{format_percent(pairs.prompt_share)} of the characters of both conversations"
    yield "answers' start", f"{format_percent(pairs.shared_share)} of their characters are the same in both"
    yield "answers alike", _of(pairs.same_but_for_space + pairs.nearly_the_same, pairs.pairs)


_LONGER = 0.65
"""The share of pairs with the longer answer chosen, or rejected, that is worth a word."""
_FEW_PAIRS = 20


def _findings_of_pairs(pairs: PairStats) -> Iterator[Finding]:
    alike = pairs.same_but_for_space + pairs.nearly_the_same
    if alike:
        text = f"answers with nearly the same words in {_of(alike, pairs.pairs)} of the pairs: little to learn from"
        yield Finding(text, tuple(pairs.examples))
    for number, what in ((pairs.tied, "one score for both answers"),
                         (pairs.scored_lower, "a higher score for the rejected answer")):  # fmt: skip
        if number:
            yield Finding(
                f"{what} in {_of(number, pairs.scored)} of the pairs with scores; they are trained as written", ()
            )
    longer = pairs.longer_share
    if pairs.pairs >= _FEW_PAIRS and max(longer, 1 - longer) >= _LONGER:
        side, share = ("chosen", longer) if longer > 0.5 else ("rejected", 1 - longer)
        yield Finding(
            f"the {side} answer is the longer one in {format_percent(share)} of the pairs: length is learned too", ()
        )


def findings_of(part: PartStats) -> Iterator[Finding]:
    """Yield the problems of one part."""
    for kind, number in part.problems.items():
        yield Finding(f"invalid, {format_count(number)}: {KINDS[kind]}", tuple(part.problem_examples[kind]))
    for rule, number in part.skipped.items():
        yield Finding(f"{format_count(number)} skipped: {SKIPPED.get(rule, rule.replace('_', ' '))}", ())
    for name, number in part.notes.items():
        if name in NOTES:
            yield Finding(f"{format_count(number)} changed: {NOTES[name]}", ())
    for name, records in part.unused.items():
        yield Finding(f"not used: field {printable_name(name)} in {records}", ())
    for remark in part.remarks:
        yield Finding(remark, ())
    if part.pairs is not None:
        yield from _findings_of_pairs(part.pairs)
    if part.exact_duplicates:
        yield Finding(
            f"{format_count(part.exact_duplicates)} repeat an earlier conversation", _pairs(part.duplicate_examples)
        )
    if part.near_duplicates:
        yield Finding(
            f"{format_count(part.near_duplicates)} nearly repeat an earlier conversation", _pairs(part.near_examples)
        )


def describe_overlap(overlap: Overlap) -> str:
    """Describe what two parts have in common, in one sentence."""
    if not (overlap.same or overlap.same_start or overlap.near):
        return f"no overlap between {overlap.first} and {overlap.second}"
    near = "" if overlap.near is None else f", {format_count(overlap.near)} nearly the same"
    return (
        f"{overlap.second} shares with {overlap.first}: "
        f"{format_count(overlap.same)} identical conversations{near}, "
        f"{format_count(overlap.same_start)} with the same first user message"
    )


def describe_benchmark(benchmark: BenchmarkOverlap) -> str:
    """Describe which questions of a benchmark occur in the data, in one sentence."""
    where = f"{benchmark.path}: {format_count(benchmark.found)} of {format_count(benchmark.questions)} questions found"
    conversations = (
        "1 conversation" if benchmark.conversations == 1 else f"{format_count(benchmark.conversations)} conversations"
    )
    return f"{where}, in {conversations}" if benchmark.found else where


def leaks(stats: DataStats) -> Iterator[Finding]:
    """Yield the overlaps between parts and with benchmarks."""
    for overlap in stats.overlaps:
        yield Finding(describe_overlap(overlap), _pairs(overlap.examples))
    for benchmark in stats.benchmarks:
        yield Finding(describe_benchmark(benchmark), _pairs(benchmark.examples))


def _pairs(examples: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{later}, as {earlier}" for later, earlier in examples)


def _lengths(sketch: LengthSketch) -> str:
    if not sketch.count:
        return "none"
    return (
        f"{format_count(sketch.total)}; "
        f"per conversation {format_count(sketch.smallest)} to {format_count(sketch.largest)}, "
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
    return f"{named}{rest} (of {format_count(sampled)} sampled)"


def write_stats_page(path: Path, stats: DataStats) -> Path:
    """Write a self-contained HTML page."""
    parts = [
        {
            "name": part.name,
            "tiles": _stats_tiles(part),
            "plots": _stats_plots(part),
            "statistics": list(describe_part(part)),
            "longest": part.longest,
            "counted": part.tokens is not None,
            "findings": list(findings_of(part)),
        }
        for part in stats.parts
    ]
    return write_page(path, "stats.html.jinja", parts=parts, leaks=list(leaks(stats)), seconds=stats.seconds)


def _stats_tiles(part: PartStats) -> list[tuple[str, str]]:
    repeats = part.exact_duplicates + (part.near_duplicates or 0)
    invalid = sum(part.problems.values())
    return [
        ("Conversations", format_count(part.conversations)),
        ("Turns", format_count(part.turns.total)),
        ("Tokens", format_count(part.tokens.total))
        if part.tokens
        else ("Characters", format_count(part.characters.total)),
        ("Code", format_percent(part.code_share)),
        ("Repeats", format_percent(repeats / part.conversations if part.conversations else 0.0)),
        ("Invalid records", format_count(invalid)),
    ]


def _stats_plots(part: PartStats) -> list[tuple[str, Markup]]:
    sketches = {"turns": part.turns, "characters": part.characters, "tokens": part.tokens}
    plots = []
    for name, sketch in sketches.items():
        if sketch is not None and sketch.count:
            bars = [Bar(first, last, number) for first, last, number in sketch.histogram()]
            title = f"{name.capitalize()} per conversation"
            plots.append((title, bar_plot(bars, label=f"{title} in {part.name}", x_name=name)))
    return plots


def print_stats(stats: DataStats, console: Console) -> None:
    """Print one block per part, then the overlaps."""
    for part in stats.parts:
        console.print(Text(escape_control_chars(part.name), style="bold underline"))
        console.print(_statistics_table(part))
        console.print(_longest(part))
        _print_findings(findings_of(part), console)
        console.print()
    found = list(leaks(stats))
    if found:
        console.print(Text("Overlap", style="bold underline"))
        _print_findings(found, console)


def _statistics_table(part: PartStats) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", min_width=18)
    table.add_column()
    for name, value in describe_part(part):
        table.add_row(name, Text(escape_control_chars(value)))
    return table


def _longest(part: PartStats) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("longest", min_width=18)
    table.add_column("characters", justify="right")
    if part.tokens is not None:
        table.add_column("tokens", justify="right")
    for row in part.longest:
        tokens = [] if row.tokens is None else [format_count(row.tokens)]
        table.add_row(Text(escape_control_chars(row.where)), format_count(row.characters), *tokens)
    return table


def _print_findings(findings: Iterable[Finding], console: Console) -> None:
    for finding in findings:
        console.print(Text(escape_control_chars(finding.text), style="yellow" if finding.examples else ""))
        for example in finding.examples:
            console.print(Text(f"  {escape_control_chars(example)}", style="dim"))
