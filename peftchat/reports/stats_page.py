"""Statistics of dialogues as a page with histograms."""

from pathlib import Path

from markupsafe import Markup

from peftchat.conversations.stats import DataStats, PartStats
from peftchat.formatting import format_count, format_percent
from peftchat.reports.bars import Bar, bar_plot
from peftchat.reports.page import write_page
from peftchat.reports.stats_words import facts_of, findings_of, leaks


def write_stats_page(path: Path, stats: DataStats) -> Path:
    """Write a page that needs nothing but a browser."""
    parts = [
        {
            "name": part.name,
            "tiles": _tiles(part),
            "plots": _plots(part),
            "facts": list(facts_of(part)),
            "longest": part.longest,
            "counted": part.tokens is not None,
            "findings": list(findings_of(part)),
        }
        for part in stats.parts
    ]
    return write_page(path, "stats.html.jinja", parts=parts, leaks=list(leaks(stats)), seconds=stats.seconds)


def _tiles(part: PartStats) -> list[tuple[str, str]]:
    repeats = part.exact_duplicates + (part.near_duplicates or 0)
    unusable = sum(part.problems.values())
    return [
        ("Dialogues", format_count(part.dialogues)),
        ("Turns", format_count(part.turns.total)),
        ("Tokens", format_count(part.tokens.total))
        if part.tokens
        else ("Characters", format_count(part.characters.total)),
        ("Code", format_percent(part.code_share)),
        ("Repeats", format_percent(repeats / part.dialogues if part.dialogues else 0.0)),
        ("Unusable rows", format_count(unusable)),
    ]


def _plots(part: PartStats) -> list[tuple[str, Markup]]:
    sketches = {"turns": part.turns, "characters": part.characters, "tokens": part.tokens}
    plots = []
    for name, sketch in sketches.items():
        if sketch is not None and sketch.count:
            bars = [Bar(first, last, number) for first, last, number in sketch.histogram()]
            title = f"{name.capitalize()} a dialogue"
            plots.append((title, bar_plot(bars, label=f"{title} in {part.name}", x_name=name)))
    return plots
