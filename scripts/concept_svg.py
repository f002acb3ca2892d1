"""A small SVG canvas for the pictures of the concept pages; other scripts import this.

A picture brings its own ground, so it is readable on light and dark pages, and follows the theme of the browser. It is
narrow, so that its text is still readable on a phone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from peftchat.files import write_text

WIDTH = 540
MARGIN = 18
INNER = WIDTH - 2 * MARGIN
CHARACTER = 7.25
"""Width of a monospaced character of 12 pixels, on the large side."""

_LIGHT = (
    "--ground: #ffffff; --ink: #1f2328; --soft: #59636f; --rule: #dfe3e8; --plain: #eef1f4; "
    "--c0: #1a7f37; --c1: #0969da; --c2: #bc4c00; --c3: #8250df; --c4: #0f766e; --c5: #a40e56; --on: #ffffff"
)
_DARK = (
    "--ground: #161b22; --ink: #e6edf3; --soft: #9aa4b0; --rule: #343b45; --plain: #262d36; "
    "--c0: #3fb950; --c1: #58a6ff; --c2: #f0883e; --c3: #bc8cff; --c4: #2dd4bf; --c5: #f778ba; --on: #0d1117"
)
COLORS = 6
_STYLE = (
    f":root {{ {_LIGHT} }} @media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }} "
    'text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink); } '
    "text.head { font-weight: 600; font-size: 14px; } text.soft { fill: var(--soft); font-size: 12px; } "
    'text.mono { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; } '
    "text.on { fill: var(--on); } .ground { fill: var(--ground); } .plain { fill: var(--plain); } "
    ".rule { stroke: var(--rule); stroke-width: 1; } .limit { stroke: var(--soft); stroke-width: 2; } "
    ".dash { stroke-dasharray: 4 3; } .faint { opacity: 0.45; } "
    + " ".join(f".f{n} {{ fill: var(--c{n}); }} .s{n} {{ stroke: var(--c{n}); fill: none; }}" for n in range(COLORS))
)


@dataclass
class Drawing:
    """A picture that grows downwards.

    Attributes:
        label: what it shows, for screen readers.
        y: where the next part begins.
    """

    label: str
    y: float = 8.0
    _parts: list[Markup] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """Write one line of text."""
        self._parts.append(
            Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}" xml:space="preserve">{}</text>').format(
                style, x, y, anchor, text
            )
        )

    def box(self, x: float, y: float, width: float, height: float, style: str, hint: str = "") -> None:
        """Draw a filled rectangle, with a tooltip."""
        self._parts.append(
            Markup(
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2"><title>{}</title></rect>'
            ).format(style, x, y, width, height, hint)
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str, width: float = 1) -> None:
        """Draw a line."""
        self._parts.append(
            Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke-width="{}"/>').format(
                style, x1, y1, x2, y2, width
            )
        )

    def path(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """Draw a line through points."""
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(Markup('<polyline class="{}" points="{}" stroke-width="1.8"/>').format(style, text))

    def dot(self, x: float, y: float, style: str, radius: float = 3, hint: str = "") -> None:
        """Draw a dot with a tooltip."""
        self._parts.append(
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
                style, x, y, radius, hint
            )
        )

    def heading(self, text: str, *notes: str) -> None:
        """Write a heading with lines below it, and move on."""
        self.y += 22
        self.text(MARGIN, self.y, text, "head")
        for note in notes:
            self.y += 17
            self.text(MARGIN, self.y, note, "soft")
        self.y += 10

    def write(self, path: Path) -> None:
        """Write the file."""
        height = math.ceil(self.y + 12)
        ground = Markup('<rect class="ground" width="{}" height="{}" rx="8"/>').format(WIDTH, height)
        body = Markup().join([ground, *self._parts])
        write_text(
            path,
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img"><title>{Markup.escape(self.label)}</title><style>{_STYLE}</style>{body}</svg>\n',
        )
        print(f"wrote {path}")


def flow_tokens(drawing: Drawing, tokens: Sequence[tuple[str, bool]]) -> None:
    """Write tokens one behind the other, those that are trained on a colored ground."""
    x, height = float(MARGIN), 18
    for text, trained in tokens:
        width = CHARACTER * len(text) + 6
        if x + width > WIDTH - MARGIN:
            x, drawing.y = MARGIN, drawing.y + height + 3
        drawing.box(
            x, drawing.y, width - 1.5, height, "f0" if trained else "plain", "trained" if trained else "context"
        )
        drawing.text(x + 2.5, drawing.y + 13, text, "mono on" if trained else "mono")
        x += width
    drawing.y += height + 6


@dataclass(frozen=True)
class LogAxis:
    """A horizontal axis of powers of ten.

    Attributes:
        low, high: the exponents at its ends.
        left, right: where they lie.
    """

    low: int
    high: int
    left: float = MARGIN + 150
    right: float = WIDTH - MARGIN - 8

    def x(self, value: float) -> float:
        """Return the place of a value; smaller and larger ones lie at the ends."""
        exponent = self.low if value <= 0 else min(max(math.log10(value), self.low), self.high)
        return self.left + (self.right - self.left) * (exponent - self.low) / (self.high - self.low)

    def draw(self, drawing: Drawing, top: float, bottom: float, name: str, step: int = 1) -> None:
        """Draw the grid, and below it the numbers and the name."""
        for exponent in range(self.low, self.high + 1, step):
            x = self.x(10.0**exponent)
            drawing.line(x, top, x, bottom, "rule")
            drawing.text(x, bottom + 15, "1" if exponent == 0 else f"1e{exponent}", "soft", "middle")
        drawing.text((self.left + self.right) / 2, bottom + 32, name, "soft", "middle")


@dataclass(frozen=True)
class Axis:
    """A horizontal axis of even steps between two values."""

    low: float
    high: float
    left: float = MARGIN + 90
    right: float = WIDTH - MARGIN - 8

    def x(self, value: float) -> float:
        """Return the place of a value."""
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)

    def draw(self, drawing: Drawing, top: float, bottom: float, name: str, ticks: Sequence[float], form: str) -> None:
        """Draw the grid, and below it the numbers and the name."""
        for value in ticks:
            drawing.line(self.x(value), top, self.x(value), bottom, "rule")
            drawing.text(self.x(value), bottom + 15, format(value, form), "soft", "middle")
        drawing.text((self.left + self.right) / 2, bottom + 32, name, "soft", "middle")
