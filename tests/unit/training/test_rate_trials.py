"""What short runs at several rates say: the advice, its neighbors, and the errors of differences."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from peftchat.errors import VerificationError
from peftchat.recipe import load_recipe
from peftchat.reports.rate_terminal import print_rate_search
from peftchat.training.held_out import HeldOutCase
from peftchat.training.rate_rule import RuleRate
from peftchat.training.rate_trials import GRID_STEP, Gap, RateSearch, RateTrial, judge
from tests.support.recipes import write_recipe

RULE = RuleRate(1e-3, "a reason")


def conversations(means: np.ndarray, lengths: np.ndarray) -> tuple[HeldOutCase, ...]:
    return tuple(HeldOutCase(int(n), float(mean * n)) for mean, n in zip(means, lengths, strict=True))


def search(losses: list[float | None], noise: float = 0.0) -> RateSearch:
    """Judge trials with these losses; the noise of each conversation is its own at each rate."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 200, 60)
    trials = []
    for place, loss in enumerate(losses):
        held_out = () if loss is None else conversations(loss + noise * draw.normal(size=60), lengths)
        trials.append(RateTrial(1e-3 * GRID_STEP**place, (2.0,), held_out, "the loss is nan" if loss is None else None))
    return judge(trials, rule=RULE, steps=40, run_steps=80, loss_before=9.0, seed=1)


def test_the_advice_is_the_lowest_point_of_a_parabola() -> None:
    for lowest in (2.0, 2.3, 2.45, 1.6):
        found = search([(place - lowest) ** 2 / 10 + 1 for place in range(6)])
        assert found.advised == pytest.approx(1e-3 * GRID_STEP**lowest, rel=0.04)  # It is written with two digits.
        assert not found.at_edge


def test_rates_that_cannot_be_told_apart_are_named() -> None:
    clear = search([1.3, 1.2, 1.0, 1.2, 1.4], noise=0.001)
    assert clear.low == clear.high == pytest.approx(1e-3 * GRID_STEP**2)
    near = search([1.5, 1.001, 1.0, 1.002, 1.5], noise=0.3)
    assert (near.low, near.high) == pytest.approx((1e-3 * GRID_STEP, 1e-3 * GRID_STEP**3))
    assert "cannot be told apart" in near.certainty


def test_failed_runs_and_ends() -> None:
    found = search([1.5, 1.2, 1.0, None, None])
    assert found.advised == pytest.approx(1e-3 * GRID_STEP**2, rel=0.04)
    assert found.as_dict()["trials"][3]["problem"] == "the loss is nan"
    assert search([1.0, 1.2, 1.3]).at_edge
    with pytest.raises(VerificationError, match="nan"):
        search([None, None])


def test_the_error_of_a_difference_is_that_of_drawing_other_conversations() -> None:
    draw = np.random.default_rng(1)
    lengths = draw.integers(5, 400, 80)
    base = draw.normal(3.0, 0.5, 80)
    one, other = base + draw.normal(0.05, 0.1, 80), base
    gap = Gap.between(conversations(one, lengths), conversations(other, lengths))
    assert gap.value == pytest.approx(float(((one - other) * lengths).sum() / lengths.sum()))
    drawn = draw.integers(0, 80, (20_000, 80))
    again = ((one - other) * lengths)[drawn].sum(1) / lengths[drawn].sum(1)
    assert gap.error == pytest.approx(float(again.std()), rel=0.05)


def test_the_command_to_run_names_the_recipe_that_was_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.train=[{path: my file.jsonl}]", "training.learning_rate=1", "method=full"]
    file = write_recipe(tmp_path / "r.yaml", tmp_path, tmp_path / "train.jsonl")
    print_rate_search(search([1.2, 1.0, 1.2]), load_recipe(file, overrides))
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("or: ")
    program, verb, recipe, *flags = shlex.split(command)
    assert (program, verb, recipe) == ("peftchat", "train", str(file))
    assert flags == ["--set", overrides[0], "--set", "method=full", "--set", "training.learning_rate=2.2e-3"]
