"""The mask as a page: rows in colour, each token with its id, role and part under the pointer."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from markupsafe import Markup, escape

from peftchat.chat_template.loss_mask import TurnPart
from peftchat.reports.mask_rows import ShownRow, ShownToken, harmless
from peftchat.reports.mask_summary import MaskSummary
from peftchat.reports.page import write_page

_PARTS = {
    TurnPart.OUTSIDE: "outside the turns",
    TurnPart.HEADER: "header",
    TurnPart.CONTENT: "content",
    TurnPart.END: "end",
    TurnPart.TRAILER: "after the end",
}
_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def write_mask_page(path: Path, name: str, rows: Sequence[ShownRow], summary: MaskSummary) -> Path:
    """Write a page that needs nothing but a browser.

    Args:
        path: the file.
        name: of the recipe.
        rows: what to show; all of it ends up in the file.
        summary: the counts over all rows.
    """
    bodies = [(row, _body(row)) for row in rows]
    return write_page(path, "mask.html.jinja", name=name, summary=summary, rows=bodies)


def _body(row: ShownRow) -> Markup:
    stretches = []
    for cut, tokens in groupby(row.laid_out, key=itemgetter(1)):
        spans = Markup().join(_span(token, cut=cut) for token, _ in tokens)
        stretches.append(Markup("<del>{}</del>").format(spans) if cut else spans)
    return Markup().join(stretches)


def _span(token: ShownToken, *, cut: bool) -> Markup:
    classes = [name for name, holds in (("t", token.trained), ("s", token.special)) if holds]
    ids = " ".join(map(str, token.ids))
    state = "cut" if cut else "trained" if token.trained else "context"
    hint = f"{ids} · {token.role or 'template'} · {_PARTS[token.part]} · {state}"
    return Markup('<b class="{}" data-i="{}">{}</b>').format(" ".join(classes), hint, _text(token))


def _text(token: ShownToken) -> Markup:
    """The token's text; line breaks get a sign, so that each has a place to point at."""
    return Markup(str(escape(harmless(token.text))).replace("\n", f"<i>{_BREAK}</i>\n"))
