"""Intervals and the recommendation, from made-up results."""

import math
from statistics import fmean

import pytest

from peftchat.comparing.candidates import Candidate
from peftchat.comparing.compare_plan import TrainingJob
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult, estimate
from peftchat.comparing.recommend import recommend
from tests.support.comparing import made


def _t_mass(limit: float, freedom: int) -> float:
    """Mass of Student's t between -limit and limit, by summing its density."""
    steps = 20_000
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    points = [limit * (number + 0.5) / steps for number in range(steps)]
    return 2 * limit / steps * sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in points)


@pytest.mark.parametrize("count", [2, 3, 4, 10, 31, 32, 60])
def test_the_interval_holds_95_percent_of_students_distribution(count: int) -> None:
    numbers = [float(number) for number in range(count)]
    found = estimate(numbers)
    assert found.margin is not None
    spread = math.sqrt(sum((x - fmean(numbers)) ** 2 for x in numbers) / (count - 1) / count)
    assert _t_mass(found.margin / spread, count - 1) == pytest.approx(0.95, abs=2e-4)


def test_one_value_has_no_interval() -> None:
    assert estimate([2.5]).margin is None


def choice(*outcomes: CandidateResult) -> tuple[str, list[str]]:
    advice = recommend(outcomes, 3.0)
    assert advice is not None
    return advice.choice.candidate.name, [outcome.candidate.name for outcome in advice.tied]


def test_a_clear_difference_decides_whatever_it_costs() -> None:
    dear = made("dear", [2.00, 2.02, 1.99], seconds=100, memory=1000)
    assert choice(made("cheap", [2.50, 2.51, 2.52]), dear) == ("dear", ["dear"])


def test_within_the_noise_the_cheaper_is_taken() -> None:
    cheap, dear = made("cheap", [2.00, 2.10, 2.05]), made("dear", [2.06, 2.00, 2.04], seconds=20)
    assert choice(cheap, dear) == ("cheap", ["cheap", "dear"])


def test_seeds_are_compared_pair_by_pair() -> None:
    # The seeds differ by far more than the candidates, and yet one is better at each of them.
    better, worse = made("better", [1.0, 2.0, 3.0], seconds=20), made("worse", [1.1, 2.11, 3.09])
    assert choice(better, worse) == ("better", ["better"])


def test_sure_but_negligible_differences_are_ties() -> None:
    lower, cheap = made("lower", [2.000, 2.000, 2.000], seconds=20), made("cheap", [2.001, 2.001, 2.001])
    assert choice(lower, cheap)[0] == "cheap"


def test_costs_that_are_nearly_equal_leave_the_choice_to_the_loss() -> None:
    assert choice(made("a", [2.01], seconds=9.9), made("b", [2.0], seconds=10.0))[0] == "b"


def test_cautions_follow_from_the_numbers() -> None:
    forgetful = made("a", [5.0], tokens=1000)
    forgetful = CandidateResult(forgetful.candidate, forgetful.tried, (), Evaluation(plain_loss=3.3, merge="differs"))
    advice = recommend([forgetful, made("b", [6.0], tokens=2000)], 3.0)
    assert advice is not None
    text = " ".join(advice.cautions)
    for part in ("One seed", "did not fall", "10 %", "1,000 and 2,000 tokens", "something else"):
        assert part in text


def test_nothing_is_recommended_where_all_failed() -> None:
    candidate = Candidate("a", "lora", {})
    assert recommend([CandidateResult(candidate, [RunResult(TrainingJob(candidate, {}, 0), failure="no")])]) is None
