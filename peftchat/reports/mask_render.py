"""Rows and their mask in the terminal."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from markupsafe import Markup, escape
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.chat_template.loss_mask import TurnPart
from peftchat.formatting import format_count, format_percent
from peftchat.reports.mask import ShownExample, ShownToken, escape_control_chars
from peftchat.reports.mask_summary import MaskSummary
from peftchat.reports.page import write_page

_TRAINED = "bold green"
_TRAINED_SPECIAL = "bold black on green"
_CONTEXT = "dim"
_SPECIAL = "black on bright_black"
_CUT = "strike red"
_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def print_mask(rows: Iterable[ShownExample], summary: MaskSummary, console: Console) -> None:
    """Print the rows, what their colors mean, and the counts over all rows.

    Without colors (a pipe, NO_COLOR) brackets take their place: `[+trained+]` and `[-cut-]`.
    """
    colored = console.color_system is not None
    any_row = False
    for row in rows:
        any_row = True
        console.print(_title(row))
        console.print(_body(row, colored))
        console.print()
    if any_row:
        console.print(_legend(colored))
        console.print()
    console.print(Text(summary.headline, style="bold"))
    console.print(_roles(summary))
    console.print(_summary_lines(summary))


def _title(row: ShownExample) -> Text:
    trained = row.trained / row.length if row.length else 0.0
    cut = sum(len(token.ids) for token in row.cut)
    text = Text(escape_control_chars(row.source), style="bold underline")
    text.append(
        f"  {format_count(row.length)} tokens, {format_percent(trained)} trained", style="not bold not underline"
    )
    if cut:
        text.append(f", {format_count(cut)} cut", style="not bold not underline red")
    return text


def _body(row: ShownExample, colored: bool) -> Text:
    text = Text()
    for style, stretch in _stretches(row):
        if not colored and style in (_TRAINED, _TRAINED_SPECIAL):
            stretch = f"[+{stretch}+]"
        elif not colored and style == _CUT:
            stretch = f"[-{stretch}-]"
        text.append(stretch, style=style)
    return Text(text.plain.replace("+][+", "")) if not colored else text


def _stretches(row: ShownExample) -> Iterator[tuple[str, str]]:
    """Neighboring tokens of one style, joined."""
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
    text = escape_control_chars(token.text)
    return text if token.part == TurnPart.CONTENT else text.replace("\n", f"{_BREAK}\n")


def _legend(colored: bool) -> Text:
    if not colored:
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


def _summary_lines(summary: MaskSummary) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", min_width=24)
    table.add_column()
    for name, value, bad in summary.facts:
        table.add_row(name, Text(escape_control_chars(value), style="red" if bad else ""))
    return table


_PARTS = {
    TurnPart.OUTSIDE: "outside the turns",
    TurnPart.HEADER: "header",
    TurnPart.CONTENT: "content",
    TurnPart.END: "end",
    TurnPart.TRAILER: "after the end",
}
_PAGE_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def write_mask_page(path: Path, name: str, rows: Sequence[ShownExample], summary: MaskSummary) -> Path:
    """Write a page that needs nothing but a browser.

    Args:
        path: the file.
        name: of the recipe.
        rows: what to show; all of it ends up in the file.
        summary: the counts over all rows.
    """
    bodies = [(row, _page_body(row)) for row in rows]
    return write_page(path, "mask.html.jinja", name=name, summary=summary, rows=bodies)


def _page_body(row: ShownExample) -> Markup:
    stretches = []
    for cut, tokens in groupby(row.laid_out, key=itemgetter(1)):
        spans = Markup().join(_page_span(token, cut=cut) for token, _ in tokens)
        stretches.append(Markup("<del>{}</del>").format(spans) if cut else spans)
    return Markup().join(stretches)


def _page_span(token: ShownToken, *, cut: bool) -> Markup:
    classes = [name for name, holds in (("t", token.trained), ("s", token.special)) if holds]
    ids = " ".join(map(str, token.ids))
    state = "cut" if cut else "trained" if token.trained else "context"
    hint = f"{ids} · {token.role or 'template'} · {_PARTS[token.part]} · {state}"
    return Markup('<b class="{}" data-i="{}">{}</b>').format(" ".join(classes), hint, _page_text(token))


def _page_text(token: ShownToken) -> Markup:
    """The token's text; line breaks get a sign, so that each has a place to point at."""
    return Markup(str(escape(escape_control_chars(token.text))).replace("\n", f"<i>{_PAGE_BREAK}</i>\n"))
