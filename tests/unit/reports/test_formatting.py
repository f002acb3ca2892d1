import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat import formatting

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def test_what_was_not_measured_says_so_and_nothing_else_does() -> None:
    functions = (formatting.format_count, formatting.format_short_count, formatting.format_bytes)
    for words in (*functions, formatting.format_percent, formatting.format_decimal):
        assert words(None) == formatting.format_duration(None) == formatting.format_time(None) == "not measured"
        assert "not" not in words(0)


@given(st.floats(1e-9, 1e14))
def test_decimals_keep_three_digits_and_their_order(value: float) -> None:
    assert float(formatting.format_decimal(value)) == pytest.approx(value, rel=5.1e-3)


@given(st.floats(1, 9e14))
def test_sizes_read_back(value: float) -> None:
    number, unit = formatting.format_bytes(value).split(" ")
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert "e" not in number
    assert float(number) * scale == pytest.approx(value, rel=5.1e-3, abs=0.51)


@given(st.floats(0, 1e8))
def test_durations_read_back(seconds: float) -> None:
    text = formatting.format_duration(seconds)
    read = sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"([\d.]+) (\w+)", text))
    assert read == pytest.approx(seconds, rel=0.011, abs=0.51)
    assert "60 s" not in text
    assert "60 min" not in text


@given(st.integers(0, 10**7))
def test_clocks_read_back(seconds: int) -> None:
    parts = [int(part) for part in formatting.format_clock(seconds).split(":")]
    assert sum(part * 60**place for place, part in enumerate(reversed(parts))) == seconds


def test_a_diverged_value_is_shown_as_it_is() -> None:
    assert [formatting.format_decimal(value) for value in (math.nan, math.inf, -math.inf)] == ["nan", "inf", "-inf"]


def test_moments() -> None:
    assert formatting.format_time("2026-01-14T10:06:29+00:00") == "2026-01-14 10:06 UTC"
    assert formatting.format_time("last week") == "last week"
