"""What has become of each line, as a table for the terminal and as JSON."""

from typing import TYPE_CHECKING, Any

from peftchat.importing.draft import STATUSES, ImportedLine, shown
from peftchat.importing.importing import Imported

if TYPE_CHECKING:
    from rich.console import Console

_COLORS = {"kept": "green", "changed": "yellow", "left out": "dim", "refused": "bold red"}
_MOST_CHARACTERS = 48


def print_import(imported: Imported, console: "Console") -> None:
    """Print the table of all lines, the tool's defaults that were written down, and the counts."""
    from rich.table import Table
    from rich.text import Text

    table = Table("line", "key and value", "", "becomes, or why", box=None, pad_edge=False)
    table.columns[0].justify = "right"
    for column in table.columns:
        column.overflow = "fold"
    for line in imported.lines:
        given = f"{line.source.key}: {_short(shown(line.source.value))}"
        outcome = "; ".join(part for part in (_becomes(line), line.why) if part)
        number = "" if line.source.line is None else str(line.source.line)
        table.add_row(number, Text(given), Text(line.status, style=_COLORS[line.status]), Text(outcome))
    for entry in imported.assumed:
        outcome = f"{entry.key}: {shown(entry.value)}; {entry.why}"
        table.add_row("", Text("not written", style="dim"), Text("assumed"), Text(outcome))
    console.print(table, soft_wrap=False)
    console.print(f"\n{summary(imported)}")


def summary(imported: Imported) -> str:
    """Return the counts in one sentence."""
    counts = ", ".join(f"{imported.count(status)} {status}" for status in STATUSES)
    number = len(imported.assumed)
    assumed = f"; {number} {'default' if number == 1 else 'defaults'} of its own written down" if number else ""
    return f"{imported.tool.title}, {len(imported.lines)} lines: {counts}{assumed}."


def as_json(imported: Imported) -> dict[str, Any]:
    """Return everything that was found, as plain values."""
    return {
        "file": str(imported.path),
        "tool": imported.tool.name,
        "counts": {status: imported.count(status) for status in STATUSES},
        "lines": [
            {
                "line": line.source.line,
                "key": line.source.key,
                "value": line.source.value,
                "status": line.status,
                "becomes": line.becomes,
                "why": line.why,
                "blocks": line.blocks,
            }
            for line in imported.lines
        ],
        "assumed": [{"key": entry.key, "value": entry.value, "why": entry.why} for entry in imported.assumed],
        "to_give": imported.to_give,
    }


def _becomes(line: ImportedLine) -> str:
    return ", ".join(f"{key}: {_short(shown(value))}" for key, value in line.becomes.items())


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
