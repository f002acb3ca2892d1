"""Values with intervals, one a line, as inline SVG in the style of `peftchat.reports.svg`."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from peftchat.reports.svg import axis, tick_texts

_WIDTH, _ROW = 720, 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 190, 120, 8, 40
_LONGEST_NAME = 26


@dataclass(frozen=True)
class Mark:
    """One line of the plot.

    Args:
        name: at its left.
        value: the dot.
        margin: half of the bar; None for no bar.
        single: the values behind it, drawn small.
        colour: which of the page's line colours.
        words: the numbers, at its right.
    """

    name: str
    value: float
    margin: float | None
    single: Sequence[float]
    colour: int
    words: str


def interval_plot(marks: Sequence[Mark], *, label: str, x_name: str) -> Markup:
    """Dots with bars in the order given, on one axis; empty without marks.

    Bars that reach far beyond all values are cut at the edge: they would squeeze everything else together.
    """
    if not marks:
        return Markup()
    values = [value for mark in marks for value in (mark.value, *mark.single)]
    room = (max(values) - min(values)) or abs(values[0]) or 1.0
    ends = [end for mark in marks if mark.margin for end in (mark.value - mark.margin, mark.value + mark.margin)]
    low, high = min(values) - room / 2, max(values) + room / 2
    ticks = axis([*values, *(min(max(end, low), high) for end in ends)], most=6)
    height = _TOP + _ROW * len(marks) + _BOTTOM
    parts = [_grid(x, text, ticks, height) for x, text in zip(ticks, tick_texts(ticks), strict=True)]
    parts += [_mark(mark, ticks, _TOP + _ROW * (place + 0.5)) for place, mark in enumerate(marks)]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 6, x_name, "middle"))
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, label, Markup().join(parts)
    )


def _x(value: float, ticks: Sequence[float]) -> float:
    inside = min(max(value, ticks[0]), ticks[-1])
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (inside - ticks[0]) / (ticks[-1] - ticks[0]), 1)


def _grid(value: float, text: str, ticks: Sequence[float], height: int) -> Markup:
    x = _x(value, ticks)
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(x, x, _TOP, height - _BOTTOM)
    return line + _text(x, height - _BOTTOM + 17, text, "middle")


def _mark(mark: Mark, ticks: Sequence[float], y: float) -> Markup:
    style = f"line-{mark.colour}"
    bar = Markup()
    if mark.margin is not None:
        bar = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            style, _x(mark.value - mark.margin, ticks), _x(mark.value + mark.margin, ticks), y, y
        )
    small = Markup().join(
        Markup('<circle class="{} mark faint" cx="{}" cy="{}" r="2.5"/>').format(style, _x(value, ticks), y)
        for value in mark.single
        if len(mark.single) > 1
    )
    dot = Markup('<circle class="{} mark" cx="{}" cy="{}" r="5"><title>{}: {}</title></circle>').format(
        style, _x(mark.value, ticks), y, mark.name, mark.words
    )
    name = mark.name if len(mark.name) <= _LONGEST_NAME else f"{mark.name[: _LONGEST_NAME - 1]}…"
    return Markup().join(
        [
            bar,
            small,
            dot,
            _text(_LEFT - 12, y + 4, name, "end"),
            _text(_WIDTH - _RIGHT + 12, y + 4, mark.words, "start"),
        ]
    )


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(round(x, 1), round(y, 1), anchor, text)
