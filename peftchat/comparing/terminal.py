"""A comparison in the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.comparing.result import Result
from peftchat.comparing.words import HEADERS, Row, table_rows

_WORDS = ("variant", "settings", "merged")
_WIDE = 400
_FIRST_TO_GO = ("on disk", "above the lowest", "merged", "time", "plain text", "trained", "tokens/s")
"""Columns that a narrow terminal does without, in this order; the page has them all."""


def print_comparison(result: Result, console: Console) -> None:
    """Print the table, the recommendation and its reasons."""
    table = _fitting(table_rows(result), console.width if console.is_terminal else None)
    # A file or a pipe has no width to keep to.
    Console(file=console.file, width=max(console.width, _natural_width(table))).print(table)
    wrap = not console.is_terminal
    advice = result.recommendation
    if advice is None:
        return
    console.print(Text(advice.headline, style="bold green"))
    for reason in advice.reasons:
        console.print(Text(f"  {reason}"), soft_wrap=wrap)
    for caution in advice.cautions:
        console.print(Text.assemble(("  note: ", "yellow"), caution), soft_wrap=wrap)


def _fitting(rows: Sequence[Row], width: int | None) -> Table:
    """The table with as many columns as fit `width`; all of them without a limit."""
    left = list(HEADERS)
    table = _table(rows, left)
    for header in _FIRST_TO_GO:
        if width is None or _natural_width(table) <= width:
            break
        left.remove(header)
        table = _table(rows, left)
    return table


def _natural_width(table: Table) -> int:
    """Characters that a table takes without wrapping."""
    return Console(width=_WIDE).measure(table).maximum


def _table(rows: Sequence[Row], headers: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header in _WORDS else "right", no_wrap=True)
    for row in rows:
        if row.failure is not None:
            table.add_row(Text(row.cells[0], style="red"), Text("failed", style="red"))
            continue
        cells = [cell for header, cell in zip(HEADERS, row.cells, strict=True) if header in headers]
        style = "bold green" if row.chosen else "" if row.tied else "dim"
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table
