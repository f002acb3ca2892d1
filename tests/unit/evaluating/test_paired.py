"""Standard errors and paired intervals: against the published formulas written out, enumeration, and simulations."""

import itertools
import math
from statistics import fmean

import numpy as np
import pytest

from peftchat.evaluating.paired import mcnemar, mean_difference, paired_difference, paired_ratio, standard_error

RUNS = 1500


def test_the_clustered_error_is_the_published_triple_sum() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=24).tolist()
    clusters = random.integers(0, 6, size=24).tolist()
    mean, groups = fmean(values), len(set(clusters))
    # Miller (2024), equation 4, with the factor for few clusters.
    total = sum(
        (values[i] - mean) * (values[j] - mean)
        for i, j in itertools.product(range(24), repeat=2)
        if clusters[i] == clusters[j]
    )
    expected = math.sqrt(total * groups / (groups - 1)) / 24
    assert standard_error(values, clusters) == pytest.approx(expected)
    assert standard_error(values, list(range(24))) == pytest.approx(standard_error(values))


def test_mcnemar_is_the_enumeration_of_all_outcomes() -> None:
    for higher, lower in [(0, 0), (1, 0), (3, 3), (7, 2), (0, 6)]:
        count = higher + lower
        outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=count)]
        extreme = sum(abs(2 * wins - count) >= abs(higher - lower) for wins in outcomes)
        assert mcnemar(higher, lower) == pytest.approx(extreme / len(outcomes))


@pytest.mark.parametrize(("alike", "most"), [(0.3, 0.975), (0.9, 1.0)])
def test_intervals_of_right_and_wrong_cover_the_true_difference(alike: float, most: float) -> None:
    """With few questions that tell the models apart, the interval may be too long, never too short."""
    random = np.random.default_rng(5)
    hits = 0
    for _ in range(RUNS):
        same, right = random.random(50) < alike, random.random(50) < 0.4
        ours = np.where(same, right, random.random(50) < 0.6).astype(float)
        theirs = np.where(same, right, random.random(50) < 0.4).astype(float)
        found = paired_difference(ours.tolist(), theirs.tolist())
        assert found.low is not None and found.high is not None
        hits += found.low <= (1 - alike) * 0.2 <= found.high
    assert 0.935 <= hits / RUNS <= most


def test_intervals_over_clusters_cover_and_intervals_over_questions_do_not() -> None:
    random = np.random.default_rng(7)
    related = apart = 0
    clusters = np.repeat(np.arange(25), 6)
    for _ in range(RUNS):
        ours = random.normal(size=25)[clusters] + random.normal(size=150) * 0.5
        theirs = random.normal(size=150) * 0.5
        found = paired_difference(ours.tolist(), theirs.tolist(), clusters.tolist())
        naive = paired_difference(ours.tolist(), theirs.tolist())
        related += found.low is not None and found.high is not None and found.low <= 0 <= found.high
        apart += naive.low is not None and naive.high is not None and naive.low <= 0 <= naive.high
    assert 0.93 <= related / RUNS <= 0.975
    assert apart / RUNS < 0.75


def test_pairing_takes_out_how_hard_a_question_is() -> None:
    random = np.random.default_rng(9)
    hard = random.normal(size=400)
    ours, theirs = (hard + shift + random.normal(size=400) * 0.1 for shift in (0.05, 0.0))
    found = paired_difference(ours.tolist(), theirs.tolist())
    unpaired = math.hypot(standard_error(ours.tolist()) or 0, standard_error(theirs.tolist()) or 0)
    assert found.excludes_zero
    assert found.stderr is not None and found.stderr < unpaired / 5


def test_models_that_answer_alike_are_not_told_apart() -> None:
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.mean, found.higher, found.lower, found.p_value) == (0, 0, 0, 1)
    assert found.low is not None and found.high is not None and found.low < 0 < found.high


def test_one_question_or_one_cluster_has_no_interval() -> None:
    assert paired_difference([0.5], [0.2]).low is None
    assert paired_difference([0.5, 0.1], [0.2, 0.3], ["text", "text"]).low is None


def test_a_mean_of_tasks_adds_the_variances() -> None:
    parts = [paired_difference([1.5, 2.5, 0.5], [1.0, 1.0, 1.0]), paired_difference([3.0, 2.0], [0.5, 1.0])]
    found = mean_difference(parts)
    assert found.mean == pytest.approx(fmean(part.mean for part in parts))
    assert found.stderr == pytest.approx(math.hypot(*(part.stderr or 0 for part in parts)) / 2)


def test_the_interval_of_a_loss_per_token_is_that_of_the_jackknife() -> None:
    """Leaving out one conversation at a time needs no formula of its own."""
    random = np.random.default_rng(11)
    sizes = random.integers(5, 200, size=300)
    ours, theirs = (sizes * shift + random.normal(size=300) * np.sqrt(sizes) * 3 for shift in (2.0, 2.1))
    found = paired_ratio(ours.tolist(), theirs.tolist(), sizes.tolist())
    assert found.mean == pytest.approx((ours.sum() - theirs.sum()) / sizes.sum())
    without = (ours.sum() - theirs.sum() - ours + theirs) / (sizes.sum() - sizes)
    jackknife = math.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum())
    assert found.stderr == pytest.approx(jackknife, rel=0.02)
    assert paired_ratio([3.0], [2.0], [4]).low is None
