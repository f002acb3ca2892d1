"""Mask report in the terminal and as an HTML page."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from markupsafe import Markup, escape
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.chat_template.loss_mask import TurnPart
from peftchat.dataset.pairs import SIDES
from peftchat.formatting import format_count, format_percent
from peftchat.reports.mask import ShownExample, ShownToken, escape_control_chars
from peftchat.reports.mask_pairs import ShownPair, pairs_of
from peftchat.reports.mask_summary import MaskSummary
from peftchat.reports.page import write_page

_TRAINED = "bold green"
_TRAINED_SPECIAL = "bold black on green"
_UNTRAINED = "dim italic"
_KIND_COLORS = {TurnPart.REASONING: "magenta", TurnPart.EMPTY_REASONING: "magenta", TurnPart.TOOL_CALL: "cyan"}
_CONTEXT = "dim"
_SPECIAL = "black on bright_black"
_REMOVED = "strike red"
_LEGEND_KINDS = {"reasoning": "magenta", "tool call": "cyan"}
_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def print_mask(
    examples: Iterable[ShownExample], summary: MaskSummary, console: Console, sides: tuple[str, str] | None = None
) -> None:
    """Print examples, a legend, and the counts over all examples.

    Without colors (a pipe, NO_COLOR) brackets replace them: `[+trained+]` and `[-truncated-]`.

    Args:
        examples: the examples; of pairs, one after the other.
        summary: the counts over all of them.
        console: where to print.
        sides: what the two examples of a pair are called; None for conversations.
    """
    colored = console.color_system is not None
    any_example = False
    for example in examples if sides is None else pairs_of(sides, examples):
        any_example = True
        if isinstance(example, ShownPair):
            _print_pair(example, colored, console)
        else:
            console.print(_title(example.source, _facts(example)))
            console.print(_body(example.all_tokens, colored))
        console.print()
    if any_example:
        console.print(_legend(colored))
        console.print()
    console.print(Text(summary.headline, style="bold"))
    console.print(_roles(summary))
    console.print(_summary_lines(summary))


def _print_pair(pair: ShownPair, colored: bool, console: Console) -> None:
    """Print what both answers follow, and the answers beside each other."""
    console.print(_title(pair.source, f"{format_count(pair.shared)} tokens in common"))
    console.print(_body(pair.prompt, colored))
    table = Table(box=SIMPLE, pad_edge=False, expand=True, header_style="dim")
    bodies = []
    for name, example, tokens in pair.sides:
        table.add_column(f"{name}: {_facts(example)}", ratio=1)
        bodies.append(_body(tokens, colored))
    table.add_row(*bodies)
    console.print(table)


def _facts(example: ShownExample) -> str:
    """Return how long an example is, and how much of it is trained."""
    trained = example.trained / example.length if example.length else 0.0
    removed = sum(len(token.ids) for token in example.removed)
    text = f"{format_count(example.length)} tokens, {format_percent(trained)} trained"
    return f"{text}, {format_count(removed)} truncated" if removed else text


def _title(source: str, facts: str) -> Text:
    text = Text(escape_control_chars(source), style="bold underline")
    text.append(f"  {facts}", style=f"not bold not underline{' red' if facts.endswith('truncated') else ''}")
    return text


def _body(tokens: Iterable[tuple[ShownToken, bool]], colored: bool) -> Text:
    text = Text()
    for style, piece in _styled_text(tokens):
        if not colored and style.startswith("bold "):
            piece = f"[+{piece}+]"
        elif not colored and style == _REMOVED:
            piece = f"[-{piece}-]"
        text.append(piece, style=style)
    return Text(text.plain.replace("+][+", "")) if not colored else text


def _styled_text(tokens: Iterable[tuple[ShownToken, bool]]) -> Iterator[tuple[str, str]]:
    """Yield neighboring tokens of one style as one text."""
    style, joined = "", ""
    for token, removed in tokens:
        current = _style(token, removed)
        if current != style and joined:
            yield style, joined
            joined = ""
        style = current
        joined += _shown(token)
    if joined:
        yield style, joined.rstrip("\n")


def _style(token: ShownToken, removed: bool) -> str:
    if removed:
        return _REMOVED
    if token.special:
        return _TRAINED_SPECIAL if token.trained else _SPECIAL
    if not token.trained:
        # What the recipe leaves out of an answer, or what another example trains.
        return f"{_UNTRAINED} {_KIND_COLORS[token.part]}" if token.part in _KIND_COLORS else _CONTEXT
    return f"bold {_KIND_COLORS[token.part]}" if token.part in _KIND_COLORS else _TRAINED


def _shown(token: ShownToken) -> str:
    """Return the token's text, with a sign at line breaks of the template, which may be trained."""
    text = escape_control_chars(token.text)
    return text if token.part == TurnPart.CONTENT else text.replace("\n", f"{_BREAK}\n")


def _legend(colored: bool) -> Text:
    if not colored:
        return Text("[+trained+]  context  [-truncated to data.max_length-]")
    return Text("  ").join(
        [
            Text("trained", style=_TRAINED),
            *(Text(f"trained {name}", style=f"bold {color}") for name, color in _LEGEND_KINDS.items()),
            Text("context", style=_CONTEXT),
            Text("special token", style=_SPECIAL),
            Text("trained special token", style=_TRAINED_SPECIAL),
            Text("truncated to data.max_length", style=_REMOVED),
        ]
    )


def _roles(summary: MaskSummary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("turns of", min_width=24)
    for name in ("tokens", "trained", "share"):
        table.add_column(name, justify="right", min_width=9)
    for name, count in summary.roles:
        table.add_row(name, format_count(count.tokens), format_count(count.trained), format_percent(count.share))
        for kind, part in summary.answers if name == "assistant" else ():
            shares = (format_count(part.tokens), format_count(part.trained), format_percent(part.share))
            table.add_row(f"  {kind}", *shares, style="dim")
    total = summary.total
    table.add_row(
        "all", format_count(total.tokens), format_count(total.trained), format_percent(total.share), style="bold"
    )
    return table


def _summary_lines(summary: MaskSummary) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", min_width=24)
    table.add_column()
    for name, value, bad in summary.details:
        table.add_row(name, Text(escape_control_chars(value), style="red" if bad else ""))
    return table


_PARTS = {
    TurnPart.OUTSIDE: "outside the turns",
    TurnPart.HEADER: "header",
    TurnPart.CONTENT: "content",
    TurnPart.END: "end",
    TurnPart.TRAILER: "after the end",
    TurnPart.REASONING: "reasoning",
    TurnPart.TOOL_CALL: "tool call",
    TurnPart.PREAMBLE: "before the content",
    TurnPart.EMPTY_REASONING: "empty reasoning",
}
_PAGE_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def write_mask_page(
    path: Path, name: str, examples: Sequence[ShownExample], summary: MaskSummary,
    sides: tuple[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write a self-contained HTML page.

    Args:
        path: the file.
        name: the name of the recipe.
        examples: the examples to show.
        summary: the counts over all examples.
        sides: what the two examples of a pair are called; None for conversations.
    """
    unit = "examples" if sides is None else "pairs" if sides == SIDES else "labeled answers"
    found = examples if sides is None else pairs_of(sides, examples)
    shown = [_pair_html(one) if isinstance(one, ShownPair) else (one, example_html(one), None) for one in found]
    return write_page(path, "mask.html.jinja", name=name, summary=summary, examples=shown, unit=unit)


def _pair_html(pair: ShownPair) -> tuple[ShownPair, Markup, list[tuple[str, str, Markup]]]:
    """Return a pair, what both answers follow as spans of a page, and of each answer its name, facts and spans."""
    columns = [(name, _facts(one), _tokens_html(tokens)) for name, one, tokens in pair.sides]
    return pair, _tokens_html(pair.prompt), columns


def example_html(example: ShownExample) -> Markup:
    """Return an example as the spans of a page."""
    return _tokens_html(example.all_tokens)


def _tokens_html(shown: Iterable[tuple[ShownToken, bool]]) -> Markup:
    parts = []
    for removed, tokens in groupby(shown, key=itemgetter(1)):
        spans = Markup().join(_page_span(token, removed=removed) for token, _ in tokens)
        parts.append(Markup("<del>{}</del>").format(spans) if removed else spans)
    return Markup().join(parts)


def _page_span(token: ShownToken, *, removed: bool) -> Markup:
    kinds = {TurnPart.REASONING: "r", TurnPart.EMPTY_REASONING: "r", TurnPart.TOOL_CALL: "c"}
    classes = [name for name, holds in (("t", token.trained), ("s", token.special)) if holds]
    classes += [kinds[token.part]] if token.part in kinds else []
    ids = " ".join(map(str, token.ids))
    state = "truncated" if removed else "trained" if token.trained else "context"
    hint = f"{ids} · {token.role or 'template'} · {_PARTS[token.part]} · {state}"
    return Markup('<b class="{}" data-i="{}">{}</b>').format(" ".join(classes), hint, _page_text(token))


def _page_text(token: ShownToken) -> Markup:
    """Return the token's text, with a sign at line breaks to point at."""
    text = str(escape(escape_control_chars(token.text)))
    return Markup(text.replace("\n", f"<i>{_PAGE_BREAK}</i>\n"))  # noqa: S704 - escaped above
