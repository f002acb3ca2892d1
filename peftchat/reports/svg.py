"""Line, bar and interval plots as inline SVG.

No plotting library is needed: a page of plots stays a few kilobytes and follows the theme. Colors come from the page's
style sheet through the classes `line-0`, `line-1` and so on. Numbers and names are escaped.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from peftchat.formatting import format_count, format_short_count

_MAX_POINTS = 500
_MAX_MARKED_POINTS = 40
_MAX_BAR_LABELS = 6
_MAX_NAME_LENGTH = 26
_ROW_HEIGHT = 26
_BAR_GAP = 2
_LABEL_GAP = 8
_HALF_DIGIT = 4.2
_CHARACTER_WIDTH = 7


_FILE_COLORS = (
    "background: #ffffff; --rule: #e1e5ea; --soft: #5c6773; "
    "--line-0: #2563c9; --line-1: #d1590c; --line-2: #17794a; --line-3: #8a3fc2"
)
_FILE_STYLE = (
    "<style>.grid { stroke: var(--rule); } text { fill: var(--soft); font: 11.5px sans-serif; } "
    "polyline, line[class^='line-'] { fill: none; stroke-width: 2; } circle.mark { stroke: none; } "
    + " ".join(
        f".line-{number} {{ stroke: {color}; }} circle.mark.line-{number} {{ fill: {color}; }}"
        for number, color in enumerate(f"var(--line-{number})" for number in range(4))
    )
    + "</style>"
)
"""What a page's style sheet says about plots (`page.html.jinja`), for a file of its own."""


@dataclass(frozen=True)
class _Frame:
    """The area of a plot inside its margins, and the values at its edges; lengths in pixels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_range: tuple[float, float]
    y_range: tuple[float, float] = (0.0, 1.0)

    @property
    def right_edge(self) -> int:
        """The right end of the area."""
        return self.width - self.right

    @property
    def floor(self) -> int:
        """The lower end of the area."""
        return self.height - self.bottom

    def x(self, value: float) -> float:
        """Return the horizontal position of a value; values outside the range lie on the edge."""
        return round(self.left + (self.right_edge - self.left) * _fraction(value, self.x_range), 1)

    def y(self, value: float) -> float:
        """Return the vertical position of a value; values outside the range lie on the edge."""
        return round(self.floor - (self.floor - self.top) * _fraction(value, self.y_range), 1)

    def horizontal_line(self, value: float, text: str) -> Markup:
        """Draw a grid line at a y value with its label on the left."""
        y = self.y(value)
        return _line("grid", self.left, self.right_edge, y, y) + _text(self.left - _LABEL_GAP, y + 4, text, "end")

    def vertical_line(self, value: float, text: str) -> Markup:
        """Draw a grid line at an x value with its label below."""
        x = self.x(value)
        return _line("grid", x, x, self.top, self.floor) + self.x_label(value, text)

    def x_label(self, value: float, text: str) -> Markup:
        """Write a label below the area, inside the picture even if it is long."""
        return _text(min(self.x(value), self.width - _HALF_DIGIT * len(text)), self.floor + 17, text, "middle")

    def svg(self, parts: Iterable[Markup], *, label: str, x_name: str) -> Markup:
        """Return the picture with the name of its x axis."""
        name = _text((self.left + self.right_edge) / 2, self.height - 6, x_name, "middle")
        return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, label, Markup().join([*parts, name])
        )


def _fraction(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _line(style: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(style, x1, x2, y1, y2)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(round(x, 1), round(y, 1), anchor, text)


@dataclass(frozen=True)
class Series:
    """One line of a plot; points without a finite value are left out.

    Args:
        name: the name in the legend.
        points: pairs of x and y in the order of x.
        color: which of the page's line colors.
        faint: draw it thin and pale, behind a line that matters more.
        dashed: distinguish it from another line of the same color.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    faint: bool = False
    dashed: bool = False

    @property
    def style(self) -> str:
        """The classes of its shapes."""
        return f"line-{self.color}" + " faint" * self.faint + " dashed" * self.dashed


def line_plot(series: Sequence[Series], *, label: str, x_name: str, legend: bool = True) -> Markup:
    """Draw lines with axes, ticks, a legend if there are several, and each value as a tooltip.

    Pages with many lines have a legend of their own and switch this one off.

    Returns:
        The plot; empty if no series has a finite point.
    """
    drawn = [(line, points) for line in series if (points := _thinned(line.points))]
    if not drawn:
        return Markup()
    xs = axis([x for _, points in drawn for x, _ in points], most=7)
    ys = axis([y for _, points in drawn for _, y in points], most=6)
    names = _legend([line for line, _ in drawn]) if legend and len(drawn) > 1 else []
    above = _LEGEND_ROW * (names[-1].row + 1) if names else 0
    frame = _Frame(480, 270 + above, 52, 14, 14 + above, 42, x_range=(xs[0], xs[-1]), y_range=(ys[0], ys[-1]))
    parts = [frame.horizontal_line(value, text) for value, text in zip(ys, tick_texts(ys), strict=True)]
    parts += [frame.x_label(value, text) for value, text in zip(xs, tick_texts(xs), strict=True)]
    parts += [_polyline(frame, line, points, x_name) for line, points in drawn]
    parts += [entry.draw() for entry in names]
    return frame.svg(parts, label=label, x_name=x_name)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= _MAX_POINTS:
        return finite
    width = math.ceil(len(finite) / _MAX_POINTS)
    groups = [finite[start : start + width] for start in range(0, len(finite), width)]
    # The mean of a group keeps the trend; the last point stays as it is, since a reader looks there.
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means[:-1], finite[-1]]


def _polyline(frame: _Frame, line: Series, points: Sequence[tuple[float, float]], x_name: str) -> Markup:
    path = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)
    marked = not line.faint and len(points) <= _MAX_MARKED_POINTS
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


_LEGEND_ROW = 18
_LEGEND_LINE = 20
"""Length of the line before a name."""
_CHARACTER = 6.3
"""Width of a character of a name, on the large side."""


@dataclass(frozen=True)
class _LegendEntry:
    """A name of the legend, which stands above the plot, where no line can cross it."""

    series: Series
    row: int
    x: float

    def draw(self) -> Markup:
        """Return the line and the name."""
        y = 12 + _LEGEND_ROW * self.row
        name = _text(self.x + _LEGEND_LINE + 6, y + 4, self.series.name, "start")
        return _line(self.series.style, round(self.x, 1), round(self.x + _LEGEND_LINE, 1), y, y) + name


def _legend(lines: Sequence[Series], left: float = 52, right: float = 480 - 14) -> list[_LegendEntry]:
    """Place the names side by side, in as many rows as they need."""
    entries: list[_LegendEntry] = []
    row, x = 0, left
    for line in lines:
        width = _LEGEND_LINE + 6 + _CHARACTER * len(line.name)
        if x > left and x + width > right:
            row, x = row + 1, left
        entries.append(_LegendEntry(line, row, x))
        x += width + 18
    return entries


_LEAST_STEP = 1e-290
"""Steps below it lose their digits: the smallest numbers of a double have few."""


def axis(values: Sequence[float], most: int) -> list[float]:
    """Return about `most` round tick values that enclose all values."""
    low, high = min(values), max(values)
    if (high - low) / most < _LEAST_STEP:
        half = abs(low) / 2 if abs(low) > _LEAST_STEP else 0.5
        low, high = low - half, high + half
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Format tick values in one notation, with the digits that distinguish neighbors."""
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


def as_file(plot: Markup) -> str:
    """Return a plot as an SVG file of its own, with the light colors of the pages."""
    return (
        str(plot)
        .replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" style="{_FILE_COLORS}" ', 1)
        .replace(">", f">{_FILE_STYLE}", 1)
    )


@dataclass(frozen=True)
class Bar:
    """One bar: lengths from `first` to `last`, and how many values lie in that range."""

    first: int
    last: int
    count: int


def bar_plot(bars: Sequence[Bar], *, label: str, x_name: str) -> Markup:
    """Draw a histogram with axes, ticks, and the numbers of each bar as a tooltip; empty without bars."""
    if not bars:
        return Markup()
    highest = max(1, *(bar.count for bar in bars))
    frame = _Frame(480, 230, 46, 10, 12, 40, x_range=(0, len(bars)), y_range=(0, highest))
    parts = [frame.horizontal_line(value, format_count(value)) for value in _round_values(highest)]
    parts += [_bar(frame, bar, place, x_name) for place, bar in enumerate(bars)]
    step = -(-len(bars) // _MAX_BAR_LABELS)
    parts += [frame.x_label(place + 0.5, format_short_count(bars[place].first)) for place in range(0, len(bars), step)]
    return frame.svg(parts, label=label, x_name=x_name)


def _round_values(highest: int) -> list[int]:
    """Return two to five round values from 0 to at most `highest`."""
    step = 1
    while highest / step > 4:
        # 1, 2, 5, 10, 20, 50 …
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return list(range(0, highest + 1, step))


def _bar(frame: _Frame, bar: Bar, place: int, x_name: str) -> Markup:
    lengths = (
        format_count(bar.first) if bar.first == bar.last else f"{format_count(bar.first)} to {format_count(bar.last)}"
    )
    slot = (frame.right_edge - frame.left) / frame.x_range[1]
    # A single conversation must not vanish beside thousands.
    top = min(frame.y(bar.count), frame.floor - 1.0) if bar.count else float(frame.floor)
    return Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}" rx="1.5"><title>{}</title></rect>').format(
        round(frame.left + place * slot + _BAR_GAP / 2, 1),
        top,
        round(max(1.0, slot - _BAR_GAP), 1),
        round(frame.floor - top, 1),
        f"{lengths} {x_name}: {format_count(bar.count)} conversations",
    )


@dataclass(frozen=True)
class Mark:
    """One row of an interval plot.

    Args:
        name: the text on its left.
        value: the dot.
        margin: half of the interval; None for no interval.
        single: the values behind it, drawn small.
        color: which of the page's line colors.
        text: the numbers on its right.
        interval: both ends of an interval that does not lie evenly around the dot; in place of `margin`.
    """

    name: str
    value: float
    margin: float | None
    single: Sequence[float]
    color: int
    text: str
    interval: tuple[float, float] | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends of its interval, if it has one."""
        if self.interval is not None or self.margin is None:
            return self.interval
        return self.value - self.margin, self.value + self.margin


def interval_plot(marks: Sequence[Mark], *, label: str, x_name: str, around_zero: bool = False) -> Markup:
    """Draw dots with intervals in the order given, on one axis; empty without marks.

    Intervals that reach far beyond all values are cut at the edge: they would squeeze everything else together.

    Args:
        marks: one per row.
        label: of the picture, for screen readers.
        x_name: of the axis.
        around_zero: the values are differences: show zero, and all of every interval.
    """
    if not marks:
        return Markup()
    values = [value for mark in marks for value in (mark.value, *mark.single)] + ([0.0] if around_zero else [])
    reach = math.inf if around_zero else ((max(values) - min(values)) or abs(values[0]) or 1.0) / 2
    low, high = min(values) - reach, max(values) + reach
    ends = [end for mark in marks if mark.ends is not None for end in mark.ends]
    ticks = axis([*values, *(min(max(end, low), high) for end in ends)], most=6)
    right = max(120, 24 + _CHARACTER_WIDTH * max(len(mark.text) for mark in marks))
    frame = _Frame(720, 48 + _ROW_HEIGHT * len(marks), 190, right, 8, 40, x_range=(ticks[0], ticks[-1]))
    parts = [frame.vertical_line(value, text) for value, text in zip(ticks, tick_texts(ticks), strict=True)]
    parts += [_mark(frame, mark, frame.top + _ROW_HEIGHT * (place + 0.5)) for place, mark in enumerate(marks)]
    return frame.svg(parts, label=label, x_name=x_name)


def _mark(frame: _Frame, mark: Mark, y: float) -> Markup:
    style = f"line-{mark.color}"
    name = mark.name if len(mark.name) <= _MAX_NAME_LENGTH else f"{mark.name[: _MAX_NAME_LENGTH - 1]}…"
    parts = []
    if mark.ends is not None:
        parts.append(_line(style, frame.x(mark.ends[0]), frame.x(mark.ends[1]), y, y))
    if len(mark.single) > 1:
        small = Markup('<circle class="{} mark faint" cx="{}" cy="{}" r="2.5"/>')
        parts += [small.format(style, frame.x(value), y) for value in mark.single]
    dot = Markup('<circle class="{} mark" cx="{}" cy="{}" r="5"><title>{}: {}</title></circle>')
    parts.append(dot.format(style, frame.x(mark.value), y, mark.name, mark.text))
    parts.append(_text(frame.left - 12, y + 4, name, "end"))
    parts.append(_text(frame.right_edge + 12, y + 4, mark.text, "start"))
    return Markup().join(parts)
