"""Text forms of numbers, sizes and times, as reports and tables show them."""

import math
from datetime import datetime

UNKNOWN = "not measured"
"""The text form of None."""


def format_count(value: float | None) -> str:
    """Return a rounded number with thousands separated: `1,234,567`."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def format_short_count(value: float | None) -> str:
    """Return a number with a suffix from ten thousand on: `26.6 k`, `4.88 M`."""
    if value is None:
        return UNKNOWN
    return format_count(value) if abs(value) < 1e4 else _scaled(value, ("T", "B", "M", "k"))


def format_bytes(value: float | None) -> str:
    """Return bytes in decimal units: `236 MB`, `1.27 GB`."""
    if value is None:
        return UNKNOWN
    return f"{value:.0f} B" if abs(value) < 1e3 else _scaled(value, ("TB", "GB", "MB", "kB"))


def _scaled(value: float, units: tuple[str, str, str, str]) -> str:
    *larger, smallest = zip((1e12, 1e9, 1e6, 1e3), units, strict=True)
    for scale, unit in larger:
        # 999.6 of the next smaller unit would be rounded to "1e+03".
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / smallest[0]:.3g} {smallest[1]}"


def format_percent(value: float | None) -> str:
    """Return a fraction as percent: `63 %`; below ten percent with one decimal."""
    if value is None:
        return UNKNOWN
    percent = 100 * value
    return f"{percent:.0f} %" if percent == 0 or abs(percent) >= 9.95 else f"{percent:.1f} %"


def format_rate(rate: float) -> str:
    """Format a learning rate with two digits: `2e-4`, `1.3e-3`."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_decimal(value: float | None) -> str:
    """Return four significant digits, in scientific notation below 1e-3 and from 1e5 on."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value) or (value == int(value) and abs(value) < 1e5):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_duration(seconds: float | None) -> str:
    """Return seconds in their two largest units: `38 s`, `4 min 12 s`, `3 d 4 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def format_clock(seconds: float) -> str:
    """Return seconds as a clock shows them: `0:38`, `4:12`, `2:05:00`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_time(iso: str | None) -> str:
    """Return an ISO time to the minute: `2026-01-14 10:06 UTC`; other text unchanged."""
    if iso is None:
        return UNKNOWN
    try:
        time = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".rstrip()
