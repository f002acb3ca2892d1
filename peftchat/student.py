"""Student's t, for 95 % intervals."""

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for a two-sided 95 % interval, for 1 to 30 degrees of freedom."""

NORMAL95 = 1.959964
"""The normal quantile of a two-sided 95 % interval."""


def t_quantile(degrees: int) -> float:
    """Return Student's t for a two-sided 95 % interval.

    Beyond the table it is the normal quantile with two correction terms. They are the first of its expansion in the
    inverse degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = NORMAL95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
