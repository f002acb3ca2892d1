"""Paired intervals: against Student's own, over clusters and seeds, and on worlds whose truth is known."""

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from peftchat.comparing.outcomes import estimate
from peftchat.comparing.paired_statistics import (
    PairedComparison,
    PairedLosses,
    compare_paired,
    number_clusters,
    practical_threshold,
)
from tests.support.cli import PROJECT


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def compared(per_token: Any, tokens: Any = None, keys: Any = None) -> PairedComparison:
    """Compare losses per token of shape (candidates, seeds, conversations)."""
    count = per_token.shape[2]
    tokens = np.ones(count) if tokens is None else np.asarray(tokens, float)
    return compare_paired(
        PairedLosses(per_token * tokens, tokens, number_clusters(keys or list(map(str, range(count)))))
    )


def test_conversations_of_one_length_and_one_seed_give_students_interval() -> None:
    losses = noise(2, 1, 12)
    gap = compared(losses).gap(0, 1)
    students = estimate((losses[1, 0] - losses[0, 0]).tolist())
    assert gap.mean == pytest.approx(students.mean)
    # The quantile is that of 4,000 draws.
    assert students.margin is not None and gap.margin == pytest.approx(students.margin, rel=0.06)


def test_noise_of_runs_alone_gives_students_interval_over_seeds() -> None:
    runs = noise(2, 3, 1)
    losses = runs + 1e-6 * noise(2, 3, 50, seed=1)
    gap = compared(losses).gap(0, 1)
    students = estimate((runs[1, :, 0] - runs[0, :, 0]).tolist())
    assert students.margin is not None and gap.margin == pytest.approx(students.margin, rel=0.1)


def test_means_are_over_tokens() -> None:
    found = compared(np.array([[[1.0, 3.0]], [[1.0, 4.0]]]), tokens=[30, 10])
    assert found.losses.tolist() == [1.5, 1.75]


def test_branches_of_a_tree_add_no_certainty() -> None:
    losses = noise(2, 1, 10)
    once, twice = compared(losses), compared(np.repeat(losses, 2, axis=2), keys=list("aabbccddeeffgghhiijj"))
    assert once.gap(0, 1).margin == pytest.approx(twice.gap(0, 1).margin)
    assert (twice.num_clusters, twice.num_conversations) == (10, 20)
    # Taken for independent, they would.
    apart = compared(np.repeat(losses, 2, axis=2)).gap(0, 1)
    assert apart.margin is not None and apart.margin < 0.75 * float(once.errors[0, 1] * once.quantiles[0, 1])


def test_one_long_conversation_makes_the_interval_wider() -> None:
    losses = noise(2, 1, 20)
    even, uneven = compared(losses), compared(losses, tokens=[500, *[10] * 19])
    assert uneven.effective_clusters < 3 < 19 < even.effective_clusters
    assert uneven.quantiles[0, 1] > 1.5 * even.quantiles[0, 1]


def test_the_order_of_conversations_and_what_all_share_do_not_matter() -> None:
    losses, order = noise(3, 2, 30), np.random.default_rng(1).permutation(30)
    tokens, keys = np.arange(5, 35), [f"tree {number // 2}" for number in range(30)]
    one = compared(losses, tokens, keys)
    other = compared((losses + 7 * noise(1, 2, 30, seed=2))[..., order], tokens[order], [keys[i] for i in order])
    assert np.allclose(one.errors, other.errors, equal_nan=True)
    assert one.quantile_together == pytest.approx(other.quantile_together, rel=0.05)


def test_all_pairs_at_once_take_more_than_one_alone() -> None:
    found = compared(noise(6, 3, 40))
    gap = found.gap(0, 3)
    assert gap.margin is not None and gap.margin_together is not None
    assert 1.2 * gap.margin < gap.margin_together < 2.5 * gap.margin


def test_ties_and_differences() -> None:
    losses = 2.0 + 0.01 * noise(3, 3, 50)
    losses[2] += 0.1
    found = compared(losses)
    assert found.tied(practical_threshold(2.0, 3)) == [0, 1]
    assert found.tied(threshold=0.2) == [0, 1, 2]
    same = compared(np.repeat(losses[:1], 2, axis=0))
    assert same.tied(0.0) == [0, 1] and same.gap(0, 1).margin_together == 0.0


def test_one_conversation_tells_nothing_apart() -> None:
    found = compared(noise(2, 3, 1))
    gap = found.gap(0, 1)
    assert gap.margin is None and gap.margin_together is None and found.tied(0.0) == [0, 1]


def test_one_seed_needs_more_than_the_interval_over_conversations() -> None:
    losses = np.stack([np.full((1, 40), 2.0), np.full((1, 40), 2.015)]) + 1e-4 * noise(2, 1, 40)
    threshold = practical_threshold(2.0, 1)
    assert compared(losses).tied(threshold) == [0, 1]
    assert compared(losses + np.array([0.0, 0.02])[:, None, None]).tied(threshold) == [0]


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibrate_compare", PROJECT / "scripts" / "calibrate_compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "worlds"), [("2 equal, 3 seeds", 150), ("8 equal, 5 rates", 40), ("4, gaps of 0.05", 60)]
)
def test_intervals_hold_the_truth_and_equal_variants_are_tied(calibration: ModuleType, name: str, worlds: int) -> None:
    (scenario,) = (one for one in calibration.SCENARIOS if one.name == name)
    counts = calibration.count_worlds(scenario, worlds, seed=3)
    assert counts.covered / counts.pairs > 0.92
    # More would come by chance once in a thousand times, if it happens in 5 % of the worlds.
    assert counts.any_false <= 0.05 * worlds + 3.1 * (0.0475 * worlds) ** 0.5
    assert counts.wrong == 0 and (sum(scenario.gaps) == 0 or counts.told_apart > 0.4 * counts.different_pairs)
