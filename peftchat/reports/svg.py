"""Line plots as inline SVG, without a plotting library: a page of plots stays a few kilobytes and follows the theme.

Colours come from the page's style sheet through the classes `line-0`, `line-1` and so on; numbers and names are
escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

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
        colour: which of the page's line colours.
        faint: draw it thin and pale, behind a line that matters more.
        dashed: tell it from another line of the same colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    dashed: bool = False

    @property
    def style(self) -> str:
        """Classes of its shapes."""
        return f"line-{self.colour}" + " faint" * self.faint + " dashed" * self.dashed


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
    """Tick values in one notation, with the digits that tell neighbours apart."""
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
