"""Line plots as inline SVG, without a plotting library: a page of plots stays a few kilobytes and follows the theme.

Colors come from the page's style sheet through the classes `line-0`, `line-1` and so on; numbers and names are
escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from peftchat.formatting import format_count, format_short_count

_WIDTH, _HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 42
_MOST_POINTS = 500
_MOST_MARKS = 40
_HALF_DIGIT = 3.4


@dataclass(frozen=True)
class Series:
    """One line of a plot; points without a finite value are left out.

    Args:
        name: the name in the legend.
        points: pairs of x and y in the order of x.
        color: which of the page's line colors.
        faint: draw it thin and pale, behind a line that matters more.
        dashed: tell it from another line of the same color.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    faint: bool = False
    dashed: bool = False

    @property
    def style(self) -> str:
        """Classes of its shapes."""
        return f"line-{self.color}" + " faint" * self.faint + " dashed" * self.dashed


def line_plot(series: Sequence[Series], *, label: str, x_name: str, legend: bool = True) -> Markup:
    """A plot with axes, ticks, a legend if there are several lines, and each value as a tooltip.

    Pages with many lines have a legend of their own and switch this one off.

    Returns an empty string where no series has a finite point.
    """
    drawn = [(line, points) for line in series if (points := _thinned(line.points))]
    if not drawn:
        return Markup()
    xs = axis([x for _, points in drawn for x, _ in points], most=7)
    ys = axis([y for _, points in drawn for _, y in points], most=6)
    frame = _Frame(xs[0], xs[-1], ys[0], ys[-1])
    body = Markup().join(
        [
            _grid(frame, xs, ys),
            *(_line(frame, line, points, x_name) for line, points in drawn),
            _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_name, "middle"),
            _legend([line for line, _ in drawn]) if legend and len(drawn) > 1 else Markup(),
        ]
    )
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, body
    )


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return round(_LEFT + inner * (value - self.x_low) / (self.x_high - self.x_low), 1)

    def y(self, value: float) -> float:
        inner = _HEIGHT - _TOP - _BOTTOM
        return round(_HEIGHT - _BOTTOM - inner * (value - self.y_low) / (self.y_high - self.y_low), 1)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= _MOST_POINTS:
        return finite
    width = math.ceil(len(finite) / _MOST_POINTS)
    groups = [finite[start : start + width] for start in range(0, len(finite), width)]
    # The mean of a group keeps the trend; the last point stays as it is, since a reader looks there.
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means[:-1], finite[-1]]


def axis(values: Sequence[float], most: int) -> list[float]:
    """About `most` round tick values that enclose all values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Tick values in one notation, with the digits that tell neighbors apart."""
    step = values[1] - values[0]
    largest = max(abs(value) for value in values)
    finest = math.floor(math.log10(step) + 1e-9)
    # A step of 2.5 needs one more digit than its power of ten.
    finest -= 0 if math.isclose(round(step, -finest), step) else 1
    if 1e-2 <= largest < 1e5:
        return [f"{value:,.{max(0, -finest)}f}" for value in values]
    return [_scientific(value, finest) if abs(value) > step / 2 else "0" for value in values]


def _scientific(value: float, finest: int) -> str:
    digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - finest)
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def _grid(frame: _Frame, xs: Sequence[float], ys: Sequence[float]) -> Markup:
    parts = []
    for value, text in zip(ys, tick_texts(ys), strict=True):
        y = frame.y(value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        )
        parts.append(_text(_LEFT - 8, y + 4, text, "end"))
    for value, text in zip(xs, tick_texts(xs), strict=True):
        # A long number at the right end would leave the picture.
        x = min(frame.x(value), _WIDTH - _HALF_DIGIT * len(text))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 18, text, "middle"))
    return Markup().join(parts)


def _line(frame: _Frame, line: Series, points: Sequence[tuple[float, float]], x_name: str) -> Markup:
    path = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)
    marked = not line.faint and len(points) <= _MOST_MARKS
    dots = Markup().join(
        Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
            f"{line.style} {'mark' if marked else 'hidden'}",
            frame.x(x),
            frame.y(y),
            2.5 if marked else 5,
            f"{line.name}: {y:.4g} at {x_name} {x:,.6g}",
        )
        for x, y in points
    )
    return Markup('<polyline class="{}" points="{}"/>').format(line.style, path) + dots


def _legend(lines: Sequence[Series]) -> Markup:
    parts = []
    for place, line in enumerate(lines):
        y = _TOP + 10 + 18 * place
        parts.append(
            Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                line.style, _WIDTH - _RIGHT - 26, _WIDTH - _RIGHT - 6, y, y
            )
        )
        parts.append(_text(_WIDTH - _RIGHT - 32, y + 4, line.name, "end"))
    return Markup().join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


_BAR_WIDTH, _BAR_HEIGHT = 480, 230
_BAR_LEFT, _BAR_RIGHT, _BAR_TOP, _BAR_BOTTOM = 46, 10, 12, 40
_BAR_GAP = 2
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
    width = (_BAR_WIDTH - _BAR_LEFT - _BAR_RIGHT) / len(bars)
    floor = _BAR_HEIGHT - _BAR_BOTTOM
    scale = (floor - _BAR_TOP) / highest
    parts = [_bar_grid(floor - scale * value, format_count(value)) for value in _round_values(highest)]
    every = -(-len(bars) // _TICKS)
    for place, bar in enumerate(bars):
        left = _BAR_LEFT + place * width
        parts.append(_bar(bar, left + _BAR_GAP / 2, width - _BAR_GAP, floor, scale, x_name))
        if place % every == 0:
            parts.append(_bar_text(left + width / 2, floor + 17, format_short_count(bar.first), "middle"))
    parts.append(_bar_text((_BAR_LEFT + _BAR_WIDTH - _BAR_RIGHT) / 2, _BAR_HEIGHT - 5, x_name, "middle"))
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _BAR_WIDTH, _BAR_HEIGHT, label, Markup().join(parts)
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
    # A single conversation must not vanish beside thousands.
    height = max(1.0, bar.count * scale) if bar.count else 0.0
    return Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}" rx="1.5"><title>{}</title></rect>').format(
        round(left, 1),
        round(floor - height, 1),
        round(max(1.0, width), 1),
        round(height, 1),
        f"{lengths} {x_name}: {format_count(bar.count)} conversations",
    )


def _bar_grid(y: float, text: str) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        _BAR_LEFT, _BAR_WIDTH - _BAR_RIGHT, round(y, 1), round(y, 1)
    )
    return line + _bar_text(_BAR_LEFT - 6, round(y + 4, 1), text, "end")


def _bar_text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(round(x, 1), y, anchor, text)


_INTERVAL_WIDTH, _ROW = 720, 26
_INTERVAL_LEFT, _INTERVAL_RIGHT, _INTERVAL_TOP, _INTERVAL_BOTTOM = 190, 120, 8, 40
_LONGEST_NAME = 26


@dataclass(frozen=True)
class Mark:
    """One line of the plot.

    Args:
        name: at its left.
        value: the dot.
        margin: half of the bar; None for no bar.
        single: the values behind it, drawn small.
        color: which of the page's line colors.
        words: the numbers, at its right.
    """

    name: str
    value: float
    margin: float | None
    single: Sequence[float]
    color: int
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
    height = _INTERVAL_TOP + _ROW * len(marks) + _INTERVAL_BOTTOM
    parts = [_interval_grid(x, text, ticks, height) for x, text in zip(ticks, tick_texts(ticks), strict=True)]
    parts += [_mark(mark, ticks, _INTERVAL_TOP + _ROW * (place + 0.5)) for place, mark in enumerate(marks)]
    parts.append(_interval_text((_INTERVAL_LEFT + _INTERVAL_WIDTH - _INTERVAL_RIGHT) / 2, height - 6, x_name, "middle"))
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _INTERVAL_WIDTH, height, label, Markup().join(parts)
    )


def _interval_x(value: float, ticks: Sequence[float]) -> float:
    inside = min(max(value, ticks[0]), ticks[-1])
    return round(
        _INTERVAL_LEFT
        + (_INTERVAL_WIDTH - _INTERVAL_LEFT - _INTERVAL_RIGHT) * (inside - ticks[0]) / (ticks[-1] - ticks[0]),
        1,
    )


def _interval_grid(value: float, text: str, ticks: Sequence[float], height: int) -> Markup:
    x = _interval_x(value, ticks)
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        x, x, _INTERVAL_TOP, height - _INTERVAL_BOTTOM
    )
    return line + _interval_text(x, height - _INTERVAL_BOTTOM + 17, text, "middle")


def _mark(mark: Mark, ticks: Sequence[float], y: float) -> Markup:
    style = f"line-{mark.color}"
    bar = Markup()
    if mark.margin is not None:
        bar = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            style, _interval_x(mark.value - mark.margin, ticks), _interval_x(mark.value + mark.margin, ticks), y, y
        )
    small = Markup().join(
        Markup('<circle class="{} mark faint" cx="{}" cy="{}" r="2.5"/>').format(style, _interval_x(value, ticks), y)
        for value in mark.single
        if len(mark.single) > 1
    )
    dot = Markup('<circle class="{} mark" cx="{}" cy="{}" r="5"><title>{}: {}</title></circle>').format(
        style, _interval_x(mark.value, ticks), y, mark.name, mark.words
    )
    name = mark.name if len(mark.name) <= _LONGEST_NAME else f"{mark.name[: _LONGEST_NAME - 1]}…"
    return Markup().join(
        [
            bar,
            small,
            dot,
            _interval_text(_INTERVAL_LEFT - 12, y + 4, name, "end"),
            _interval_text(_INTERVAL_WIDTH - _INTERVAL_RIGHT + 12, y + 4, mark.words, "start"),
        ]
    )


def _interval_text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(round(x, 1), round(y, 1), anchor, text)
