"""The win rate at equal style, against another solver, and worlds in which the answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat.judging.judge_run import Judgment, Outcome
from peftchat.judging.judged_pairs import Pair
from peftchat.judging.style import STYLE, fit_style, style_differences, style_of
from peftchat.judging.verdicts import verdict_of


def by_gradient(points: np.ndarray, differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Intercept and slopes of the same penalized likelihood, by plain gradient descent, one weighting at a time."""
    typical = np.sqrt((differences**2).mean(axis=0))
    design = np.column_stack([np.ones(len(points)), differences / np.where(typical > 0, typical, 1)])
    penalty = 1 / weights.sum()
    shares, found = weights / weights.sum(), np.zeros(design.shape[1])
    pace = 1 / (0.25 * np.linalg.eigvalsh((design * shares[:, None]).T @ design).max() + penalty)
    for _ in range(20_000):
        gradient = design.T @ (shares * (1 / (1 + np.exp(-design @ found)) - points)) + penalty * found
        found = found - pace * gradient
        if np.abs(gradient).max() < 1e-10:
            break
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_that_of_another_solver(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(5, 60))
    differences = random.normal(0.2, 0.5, (count, 4)) * (1, 1, seed % 2, 1)
    points = random.choice([0.0, 0.5, 1.0], count)
    weights = random.integers(0, 4, (3, count)).astype(float) + np.array([[1.0], [0.5], [0.25]])
    fit = fit_style(points, differences, weights)
    for row in range(3):
        intercept, *slopes = by_gradient(points, differences, weights[row])
        assert fit.rates[row] == pytest.approx(1 / (1 + np.exp(-intercept)), abs=1e-6)
        assert fit.slopes[row] == pytest.approx(slopes, abs=1e-5)


def test_a_judge_of_bold_text_shows_at_equal_style() -> None:
    """A has more bold text in most answers and wins by it; at equal style neither is better."""
    random = np.random.default_rng(1)
    differences = random.normal(0, 0.3, (4000, 4)) + np.array([0, 0, 0, 0.5])
    points = (random.random(4000) < 1 / (1 + np.exp(-3 * differences[:, 3]))).astype(float)
    fit = fit_style(points, differences, np.ones((1, 4000)))
    assert points.mean() > 0.75 and fit.rates[0] == pytest.approx(0.5, abs=0.04)
    assert fit.slopes[0, 3] > 1 and np.abs(fit.slopes[0, :3]).max() < 0.15


def test_where_style_plays_no_part_the_rate_is_the_plain_one() -> None:
    random = np.random.default_rng(2)
    points = (random.random(4000) < 0.7).astype(float)
    for differences in (random.normal(0.2, 0.5, (4000, 4)), np.zeros((4000, 4))):
        assert fit_style(points, differences, np.ones((1, 4000))).rates[0] == pytest.approx(points.mean(), abs=0.02)


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=8))
def test_another_order_of_the_models_turns_all_signs(answers: list[tuple[str, str]]) -> None:
    differences = style_differences(answers)
    assert (np.abs(differences) < 1).all()
    assert (style_differences([pair[::-1] for pair in answers]) == -differences).all()


def test_markdown_counts_outside_of_code() -> None:
    code = "```python\n# no header\n- x\n**kwargs**\n```"
    text = f"# Title\n\n* one\n2. two\n  - **three** and __four__\n\n{code}\n## End\n#no"
    assert style_of(text) == (len(text), 2, 3, 2)
    assert style_of("```\n# never closed\n- x")[1:] == (0, 0, 0)
    assert style_of("a * b * c, 2 ** 3\n** 4, x = 1. y\n-dash\n#hash")[1:] == (0, 0, 0)


def outcome(number: int, first: str, second: str, winner: str) -> Outcome:
    said = {"A": ("first", "second"), "B": ("second", "first"), "tie": ("tie", "tie")}[winner]
    forward, backward = (
        Judgment(order, "", preference, None, 1, 1) for order, preference in zip(("AB", "BA"), said, strict=True)
    )
    return Outcome(Pair(str(number), "", "?", first, second), forward, backward)


def test_the_verdict_names_the_style_that_wins() -> None:
    """Lists win four times in five, whoever wrote them, and A wrote most; all else is alike."""
    lists, plain = "- one\n- two\n- three", "one and two\nand three"
    outcomes = []
    for at in range(100):
        texts, names = ((lists, plain), "AB") if at % 5 else ((plain, lists), "BA")
        outcomes.append(outcome(at, *texts, names[at % 25 < 5]))
    verdict = verdict_of("judge", outcomes)
    assert verdict.win_rate is not None and verdict.style_controlled is not None
    assert verdict.win_rate.value == pytest.approx(0.68)
    assert verdict.style_controlled.low < 0.5 < verdict.style_controlled.high
    assert verdict.style_slopes["list items"].low > 0 and "headers" not in verdict.style_slopes
    assert verdict.style_a["list items"] == pytest.approx(2.4) and set(verdict.style_a) == set(STYLE)


def test_a_single_question_has_a_rate() -> None:
    verdict = verdict_of("judge", [outcome(0, "# a", "b", "A")])
    assert verdict.style_controlled is not None
    assert 0.5 < verdict.style_controlled.value < 1
