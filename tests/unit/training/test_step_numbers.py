import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_scheduler

from peftchat.training.learning_rate import begin_above_zero
from peftchat.training.step_numbers import LossTrend, StepMonitor, first_not_finite, name_sources

NAN, INF = math.nan, math.inf


def step(monitor: StepMonitor, number: int, losses: list[float], norm: float | None = 1.0) -> Any:
    """End a step whose micro-batch `n` has the examples `10 n` and `10 n + 1`."""
    for index, loss in enumerate(losses):
        monitor.add(torch.tensor(loss), np.array([10 * index, 10 * index + 1]))
    return monitor.end_step(number, norm, 1e-3)


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_step_is_bad_at_once_and_only_its_bad_micro_batches_are_named(loss: float) -> None:
    monitor = StepMonitor(torch.device("cpu"))
    assert step(monitor, 1, [2.0, 1.0, 3.0]) is None
    bad = step(monitor, 2, [2.0, loss, 3.0])
    assert (bad.step, bad.examples) == (2, (10, 11))
    assert str(loss) in bad.what
    assert monitor.counts.losses == [6.0]


def test_only_the_examples_with_a_bad_target_are_named_where_targets_are_known() -> None:
    monitor = StepMonitor(torch.device("cpu"))
    monitor.add(torch.tensor(2.0), np.array([4, 5]), torch.tensor([1.0, 3.0, 2.0]), [1, 2])
    monitor.add(torch.tensor(NAN), np.array([6, 7, 8]), torch.tensor([1.0, NAN, INF, 1.0]), [1, 2, 1])
    bad = monitor.end_step(1, 1.0)
    assert bad is not None and bad.examples == (7,)


def test_a_gradient_that_is_not_finite_names_all_of_the_step() -> None:
    bad = step(StepMonitor(torch.device("cpu")), 7, [2.0, 1.0], INF)
    assert (bad.step, bad.examples) == (7, (0, 1, 10, 11))


def test_a_backend_without_a_gradient_norm_is_judged_by_its_loss() -> None:
    monitor = StepMonitor(torch.device("cpu"))
    assert step(monitor, 1, [2.0], None) is None
    assert step(monitor, 2, [NAN], None) is not None


def test_another_process_with_a_bad_loss_stops_this_one_too() -> None:
    monitor = StepMonitor(torch.device("cpu"), sum_over_processes=lambda own: own + torch.tensor([1.0, 0.0]))
    bad = step(monitor, 1, [2.0])
    assert (bad.step, bad.examples) == (1, ())


def test_skipped_float16_steps_fail_only_once_they_persist() -> None:
    monitor = StepMonitor(torch.device("cpu"), may_skip=True)
    assert all(step(monitor, number, [2.0], INF) is None for number in range(1, 29))
    assert step(monitor, 29, [2.0]) is None
    assert all(step(monitor, number, [2.0], NAN) is None for number in range(30, 59))
    bad = step(monitor, 59, [2.0], NAN)
    assert "30 steps in a row" in bad.what
    assert step(StepMonitor(torch.device("cpu"), may_skip=True), 1, [NAN], NAN) is not None


def test_a_model_without_gradients_is_stopped_unless_nothing_is_left_to_learn() -> None:
    dead, done = (StepMonitor(torch.device("cpu")) for _ in range(2))
    assert [number for number in range(1, 21) if step(dead, number, [6.0], 0.0)] == [20]
    assert not [number for number in range(1, 100) if step(done, number, [1e-6], 0.0)]
    assert dead.counts.without_gradient == 20
    assert done.counts.without_gradient == 0


@pytest.mark.parametrize(
    ("losses", "rose", "diverged"),
    [
        ([3.0, 2.0], False, False),
        ([3.0, 2.5, 2.0, 1.9, 1.8, 1.7], False, False),
        ([2.0, 2.1, 1.9, 2.0, 2.1, 1.95] * 5, False, False),
        ([2.0, 2.1, 1.9, 3.0, 3.1, 2.95], True, False),
        ([2.0, 900.0, 700.0, 30.0, 40.0, 50.0], False, True),
        ([9.0, 1.0, 9.0, 2.0, 8.0, 3.0], False, False),
        ([1.0] * 30 + [1.2] * 30, True, False),
    ],
)
def test_a_loss_that_ends_higher_is_told_from_noise(losses: list[float], rose: bool, diverged: bool) -> None:
    trend = LossTrend.of(losses)
    assert (trend is not None and trend.rose) in ({rose} if not diverged else {True, False})
    assert (trend is not None and trend.diverged(100)) == diverged


def test_the_first_trained_weight_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert first_not_finite(model.named_parameters()) is None
    with torch.no_grad():
        model[0].weight[0, 0] = NAN
        model[1].bias[1] = INF
    model[0].requires_grad_(False)
    assert first_not_finite(model.named_parameters()) == "1.bias"


def test_a_few_conversations_are_named_and_all_are_counted() -> None:
    assert name_sources(["a:1", "a:1"]) == "1 conversation: a:1"
    assert name_sources([f"a:{line}" for line in range(9)]) == "9 conversations: a:0, a:1, a:2 and 6 more"


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize(("warmup", "steps"), [(1, 1), (4, 4), (3, 10), (0, 3)])
def test_no_step_has_a_learning_rate_of_zero_and_the_rest_stays_as_in_transformers(
    kind: str, warmup: int, steps: int
) -> None:
    rates = {}
    for mended in (True, False):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        if mended:
            begin_above_zero(schedule, warmup, steps)
        rates[mended] = []
        for number in range(steps):
            rates[mended].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if mended or number + 1 < steps:  # Behind a run that is all warm-up, the polynomial divides by zero.
                schedule.step()
    assert min(rates[True]) > 0
    assert rates[True][warmup:] == rates[False][warmup:]
    assert rates[True][:warmup] == sorted(rates[True][:warmup])
    if warmup:
        assert rates[False][0] == 0  # Once transformers begins above zero by itself, `begin_above_zero` is not needed.
