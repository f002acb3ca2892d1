"""Rows and their mask in the terminal."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.chat_template.loss_mask import TurnPart
from peftchat.formatting import format_count, format_percent
from peftchat.reports.mask_rows import ShownRow, ShownToken, harmless
from peftchat.reports.mask_summary import MaskSummary

_TRAINED = "bold green"
_TRAINED_SPECIAL = "bold black on green"
_CONTEXT = "dim"
_SPECIAL = "black on bright_black"
_CUT = "strike red"
_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def print_mask(rows: Iterable[ShownRow], summary: MaskSummary, console: Console) -> None:
    """Print the rows, what their colours mean, and the counts over all rows.

    Without colours (a pipe, NO_COLOR) brackets take their place: `[+trained+]` and `[-cut-]`.
    """
    coloured = console.color_system is not None
    any_row = False
    for row in rows:
        any_row = True
        console.print(_title(row))
        console.print(_body(row, coloured))
        console.print()
    if any_row:
        console.print(_legend(coloured))
        console.print()
    console.print(Text(summary.headline, style="bold"))
    console.print(_roles(summary))
    console.print(_facts(summary))


def _title(row: ShownRow) -> Text:
    trained = row.trained / row.length if row.length else 0.0
    cut = sum(len(token.ids) for token in row.cut)
    text = Text(harmless(row.source), style="bold underline")
    text.append(
        f"  {format_count(row.length)} tokens, {format_percent(trained)} trained", style="not bold not underline"
    )
    if cut:
        text.append(f", {format_count(cut)} cut", style="not bold not underline red")
    return text


def _body(row: ShownRow, coloured: bool) -> Text:
    text = Text()
    for style, stretch in _stretches(row):
        if not coloured and style in (_TRAINED, _TRAINED_SPECIAL):
            stretch = f"[+{stretch}+]"
        elif not coloured and style == _CUT:
            stretch = f"[-{stretch}-]"
        text.append(stretch, style=style)
    return Text(text.plain.replace("+][+", "")) if not coloured else text


def _stretches(row: ShownRow) -> Iterator[tuple[str, str]]:
    """Neighbouring tokens of one style, joined."""
    style, held = "", ""
    for token, cut in row.laid_out:
        current = _style(token, cut)
        if current != style and held:
            yield style, held
            held = ""
        style = current
        held += _shown(token)
    if held:
        yield style, held.rstrip("\n")


def _style(token: ShownToken, cut: bool) -> str:
    if cut:
        return _CUT
    if token.special:
        return _TRAINED_SPECIAL if token.trained else _SPECIAL
    return _TRAINED if token.trained else _CONTEXT


def _shown(token: ShownToken) -> str:
    """The token's text; a line break of the template gets a sign, since whether it is trained matters."""
    text = harmless(token.text)
    return text if token.part == TurnPart.CONTENT else text.replace("\n", f"{_BREAK}\n")


def _legend(coloured: bool) -> Text:
    if not coloured:
        return Text("[+trained+]  context  [-cut to fit data.max_length-]")
    return Text("  ").join(
        [
            Text("trained", style=_TRAINED),
            Text("context", style=_CONTEXT),
            Text("special token", style=_SPECIAL),
            Text("trained special token", style=_TRAINED_SPECIAL),
            Text("cut to fit data.max_length", style=_CUT),
        ]
    )


def _roles(summary: MaskSummary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("turns of", min_width=24)
    for name in ("tokens", "trained", "share"):
        table.add_column(name, justify="right", min_width=9)
    for name, tally in summary.roles:
        table.add_row(name, format_count(tally.tokens), format_count(tally.trained), format_percent(tally.share))
    total = summary.total
    table.add_row(
        "all", format_count(total.tokens), format_count(total.trained), format_percent(total.share), style="bold"
    )
    return table


def _facts(summary: MaskSummary) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", min_width=24)
    table.add_column()
    for name, value, bad in summary.facts:
        table.add_row(name, Text(harmless(value), style="red" if bad else ""))
    return table
