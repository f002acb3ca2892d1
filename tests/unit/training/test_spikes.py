"""The rule for loss spikes."""

import numpy as np
import pytest

from peftchat.training.spikes import Spike, SpikeDetector, example_losses, worst_first


def judged(losses: list[float]) -> list[int]:
    detector = SpikeDetector()
    return [step for step, loss in enumerate(losses) if detector.judge(step, loss)]


def test_only_a_loss_far_above_the_steps_before_is_a_spike() -> None:
    noise = np.random.default_rng(0).normal(3.0, 0.1, 200).tolist()
    assert judged(noise) == []
    noise[100] = 4.5
    assert judged(noise) == [100]
    noise[100] = 0.5
    assert judged(noise) == []


def test_a_falling_loss_is_none_and_a_level_that_stays_is_followed() -> None:
    assert judged(np.geomspace(9, 0.1, 300).tolist()) == []
    found = judged([2.0] * 40 + [5.0] * 100)
    assert found and found[0] == 40 and found[-1] < 80


def test_few_steps_are_not_judged() -> None:
    assert judged([1.0] * 15 + [9.0]) == []
    assert judged([1.0] * 16 + [9.0]) == [16]


@pytest.mark.parametrize("counts", [[2, 0, 3], [5], [0, 0, 5]])
def test_each_example_gets_its_own_mean(counts: list[int]) -> None:
    losses = np.arange(5.0)
    parts = np.split(losses, np.cumsum(counts)[:-1])
    expected = [part.mean() if len(part) else 0.0 for part in parts]
    assert example_losses(losses, counts).tolist() == pytest.approx(expected)


def test_examples_above_the_limit_are_named_first_or_else_all() -> None:
    means = np.array([1.0, 7.0, 5.0])
    assert worst_first(Spike(1, 4.0, 1.0, 3.0), [10, 11, 12], means) == [(11, 7.0), (12, 5.0)]
    assert worst_first(Spike(1, 4.0, 1.0, 8.0), [10, 11, 12], means) == [(11, 7.0), (12, 5.0), (10, 1.0)]
