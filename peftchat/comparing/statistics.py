"""What a handful of seeds says about a mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for a two-sided 95 % interval, for 1 to 30 degrees of freedom."""

_NORMAL95 = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the 95 % interval around it.

    Attributes:
        margin: half the interval; None where one value is all there is.
        count: values it was made of.
    """

    mean: float
    margin: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95 % interval of independent values, at least one."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    return Estimate(mean, _quantile(count - 1) * stdev(values) / math.sqrt(count), count)


def _quantile(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval.

    Beyond the table it is the normal distribution's with the first two terms of its expansion in the inverse of the
    degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _NORMAL95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
