"""Files of held-out answers, a line of JSON each, with what was measured of them before the first step."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peftchat.files import write_text
from peftchat.formatting import format_count, format_percent

T = TypeVar("T")

_Z_95 = 1.959964


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the file."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_lines(path: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """Return what `make` makes of each line; nothing where the file is missing or is another program's."""
    try:
        return [make(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_before(path: Path, sources: Sequence[str], names: Sequence[str]) -> list[tuple[float, ...]]:
    """Return what the file notes of before the first step; nothing where it is of other answers, or missing.

    Args:
        path: the file.
        sources: of its lines, as they should be.
        names: of the numbers in each line.
    """
    found = read_lines(path, lambda line: (line["source"], tuple(float(line[name]) for name in names)))
    return [values for _, values in found] if [source for source, _ in found] == list(sources) else []


def mean_if_known(values: Iterable[float | None]) -> float | None:
    """Return the mean; None where one is not known, or there is none."""
    found = list(values)
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None


def mean_per_token(sums: Sequence[float | None], tokens: int) -> float | None:
    """Return the mean per token of sums over answers; None where one is not known, or there is none."""
    mean = mean_if_known(sums)
    return None if mean is None else mean * len(sums) / max(1, tokens)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` cases (Wilson, 1927)."""
    square = _Z_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_text(share: float, interval: tuple[float, float], number: int, what: str) -> str:
    """Return a share of the held-out answers with its 95 % interval, in words.

    Args:
        share: the share.
        interval: its ends.
        number: of which it is the share.
        what: they are: "pairs".
    """
    low, high = map(format_percent, interval)
    return f"{format_percent(share)} of {format_count(number)} held-out {what} (95 % interval {low} to {high})"
