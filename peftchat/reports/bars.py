"""Histograms as inline SVG, in the style of `peftchat.reports.svg`."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from peftchat.formatting import format_count, format_short_count

_WIDTH, _HEIGHT = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 40
_GAP = 2
_TICKS = 6


@dataclass(frozen=True)
class Bar:
    """One bar: lengths from `first` to `last`, and how many values lie there."""

    first: int
    last: int
    count: int


def bar_plot(bars: Sequence[Bar], *, label: str, x_name: str) -> Markup:
    """A histogram with axes, ticks, and the numbers of each bar as a tooltip; empty without bars."""
    if not bars:
        return Markup()
    highest = max(1, *(bar.count for bar in bars))
    width = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    floor = _HEIGHT - _BOTTOM
    scale = (floor - _TOP) / highest
    parts = [_grid(floor - scale * value, format_count(value)) for value in _round_values(highest)]
    every = -(-len(bars) // _TICKS)
    for place, bar in enumerate(bars):
        left = _LEFT + place * width
        parts.append(_bar(bar, left + _GAP / 2, width - _GAP, floor, scale, x_name))
        if place % every == 0:
            parts.append(_text(left + width / 2, floor + 17, format_short_count(bar.first), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_name, "middle"))
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, Markup().join(parts)
    )


def _round_values(highest: int) -> list[int]:
    """Two to five round values from 0 to at most `highest`."""
    step = 1
    while highest / step > 4:
        # 1, 2, 5, 10, 20, 50 …
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return list(range(0, highest + 1, step))


def _bar(bar: Bar, left: float, width: float, floor: float, scale: float, x_name: str) -> Markup:
    lengths = (
        format_count(bar.first) if bar.first == bar.last else f"{format_count(bar.first)} to {format_count(bar.last)}"
    )
    # A single dialogue must not vanish beside thousands.
    height = max(1.0, bar.count * scale) if bar.count else 0.0
    return Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}" rx="1.5"><title>{}</title></rect>').format(
        round(left, 1),
        round(floor - height, 1),
        round(max(1.0, width), 1),
        round(height, 1),
        f"{lengths} {x_name}: {format_count(bar.count)} dialogues",
    )


def _grid(y: float, text: str) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        _LEFT, _WIDTH - _RIGHT, round(y, 1), round(y, 1)
    )
    return line + _text(_LEFT - 6, round(y + 4, 1), text, "end")


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(round(x, 1), y, anchor, text)
