"""Many lengths in little memory: counts on a logarithmic scale."""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field

_GROWTH = 1.02
_LOG_GROWTH = math.log(_GROWTH)
_QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
_EXACT_BELOW = 50
"""Below this each length has a bin of its own: bins of 2 % would be narrower than 1."""


@dataclass(slots=True)
class LengthSketch:
    """Mean and extremes exactly, quantiles to 1 %, whatever the number of values.

    The idea is that of DDSketch (Masson, Rim and Lee, 2019): bins whose borders grow by a constant factor.
    """

    count: int = 0
    total: int = 0
    smallest: int = 0
    largest: int = 0
    _bins: Counter[int] = field(default_factory=Counter)

    def add(self, value: int) -> None:
        """Count one length, 0 or more."""
        self.smallest = value if not self.count else min(self.smallest, value)
        self.largest = max(self.largest, value)
        self.count += 1
        self.total += value
        self._bins[_bin_of(value)] += 1

    @property
    def mean(self) -> float:
        """The mean, 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int:
        """The length that `share` of the values (0 to 1) do not exceed."""
        rank = share * (self.count - 1)
        seen = 0
        for number in sorted(self._bins):
            seen += self._bins[number]
            if seen > rank:
                return min(max(_middle(number), self.smallest), self.largest)
        return self.largest

    def as_dict(self) -> dict[str, float]:
        """Count, total, mean, extremes and quantiles."""
        summary = {
            "count": self.count,
            "total": self.total,
            "mean": round(self.mean, 2),
            "min": self.smallest,
            "max": self.largest,
        }
        return {**summary, **{name: self.quantile(share) for name, share in _QUANTILES.items()}}

    def histogram(self, most_bars: int = 24) -> list[tuple[int, int, int]]:
        """Bars as (first length, last length, count): one a length where there are few, else of equal ratio.

        Bars without a value between others are kept, so that gaps show. Borders are exact to 2 %.
        """
        if not self.count:
            return []
        if self.largest - self.smallest < most_bars and self.largest < _EXACT_BELOW:
            return [(length, length, self._bins[length]) for length in range(self.smallest, self.largest + 1)]
        ratio = (self.largest + 1) / max(1, self.smallest)
        edges = {math.ceil(max(1, self.smallest) * ratio ** (bar / most_bars)) for bar in range(1, most_bars)}
        firsts = sorted({self.smallest, *(edge for edge in edges if edge <= self.largest)})
        counts: Counter[int] = Counter()
        for number, count in self._bins.items():
            length = min(max(_middle(number), self.smallest), self.largest)
            counts[bisect_right(firsts, length) - 1] += count
        lasts = [first - 1 for first in firsts[1:]] + [self.largest]
        return [(first, last, counts[bar]) for bar, (first, last) in enumerate(zip(firsts, lasts, strict=True))]


def _bin_of(value: int) -> int:
    # The logarithmic bin of 50 has the number 197, so the two kinds never meet.
    return value if value < _EXACT_BELOW else math.floor(math.log(value) / _LOG_GROWTH)


def _middle(number: int) -> int:
    return number if number < _EXACT_BELOW else round(_GROWTH ** (number + 0.5))


EXAMPLES = 3
"""How many examples of each finding are kept."""
