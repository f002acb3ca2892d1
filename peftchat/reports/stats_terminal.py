"""Statistics of dialogues in the terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.conversations.stats import DataStats, PartStats
from peftchat.formatting import format_count
from peftchat.reports.mask_rows import harmless
from peftchat.reports.stats_words import Finding, facts_of, findings_of, leaks


def print_stats(stats: DataStats, console: Console) -> None:
    """Print a block a part, then what the parts share."""
    for part in stats.parts:
        console.print(Text(harmless(part.name), style="bold underline"))
        console.print(_facts(part))
        console.print(_longest(part))
        _print_findings(findings_of(part), console)
        console.print()
    found = list(leaks(stats))
    if found:
        console.print(Text("Overlap", style="bold underline"))
        _print_findings(found, console)


def _facts(part: PartStats) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", min_width=18)
    table.add_column()
    for name, value in facts_of(part):
        table.add_row(name, Text(harmless(value)))
    return table


def _longest(part: PartStats) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("longest", min_width=18)
    table.add_column("characters", justify="right")
    if part.tokens is not None:
        table.add_column("tokens", justify="right")
    for row in part.longest:
        tokens = [] if row.tokens is None else [format_count(row.tokens)]
        table.add_row(Text(harmless(row.where)), format_count(row.characters), *tokens)
    return table


def _print_findings(findings: Iterable[Finding], console: Console) -> None:
    for finding in findings:
        console.print(Text(harmless(finding.text), style="yellow" if finding.examples else ""))
        for example in finding.examples:
            console.print(Text(f"  {harmless(example)}", style="dim"))
