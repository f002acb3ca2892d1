"""Learning rates and other settings to try, and how good ones are found."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peftchat.comparing.candidates import Candidate, make_candidates
from peftchat.comparing.compare_plan import TrainingJob, expected_lr, lr_grid
from peftchat.comparing.hyperparameter_search import RATE, RateGrid, TreeParzen, parse_range
from peftchat.comparing.outcomes import CandidateResult, RunResult
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.variants import get_variant
from tests.support.comparing import DATA, write_records_and_recipe


@pytest.mark.parametrize("flag", ["a.b", "a.b=3", "a.b=3..1", "a.b=0..1:log", "a.b=1..2:lin", "a.b=x..y"])
def test_ranges_that_are_none_are_refused(flag: str) -> None:
    with pytest.raises(UserError):
        parse_range(flag)


def test_the_best_rate_at_an_end_is_told() -> None:
    candidate = Candidate("a", "lora", {})
    tried = [
        RunResult(TrainingJob(candidate, {RATE: rate}, 0), loss=rate, tokens=9, seconds=1.0) for rate in (0.1, 0.2, 0.3)
    ]
    assert CandidateResult(candidate, tried).edge == "lowest"
    assert (
        CandidateResult(candidate, [*tried, RunResult(TrainingJob(candidate, {RATE: 0.05}, 0), loss=9.0)]).edge is None
    )


@pytest.mark.parametrize("name", ["lora", "full", "ia3", "qlora"])
def test_each_variant_is_tried_around_its_own_rate(tmp_path: Path, name: str) -> None:
    plain = load_recipe(write_records_and_recipe(tmp_path, DATA))
    (candidate,) = make_candidates([name], [])
    own = get_variant(candidate.variant).learning_rate
    assert expected_lr(candidate, plain) == own
    # A recipe that trains LoRA at five times the customary rate wants that of every variant.
    times_five = load_recipe(
        write_records_and_recipe(
            tmp_path, f"{DATA}training: {{learning_rate: {5 * get_variant('lora').learning_rate}}}"
        )
    )
    assert expected_lr(candidate, times_five) == pytest.approx(5 * own, rel=0.05)
    assert all(later / earlier == pytest.approx(3, rel=0.1) for earlier, later in pairwise(lr_grid(own)))


def test_a_grid_of_rates_is_asked_in_order() -> None:
    search = RateGrid([1e-4, 1e-3])
    assert [settings[RATE] for settings in iter(search.ask, None)] == [1e-4, 1e-3]


def test_the_search_finds_a_good_rate_and_repeats_itself() -> None:
    pytest.importorskip("optuna")
    ranges = [parse_range("training.learning_rate=1e-6..1e-1:log"), parse_range("adapter.r=2..64:log")]

    def walk() -> list[tuple[float, dict[str, Any]]]:
        search = TreeParzen(25, ranges, {"training.weight_decay": 0.0}, seed=3)
        seen = []
        while (settings := search.ask()) is not None:
            assert 1e-6 <= settings[RATE] <= 1e-1
            assert isinstance(settings["adapter.r"], int) and 2 <= settings["adapter.r"] <= 64
            loss = (math.log10(settings[RATE]) + 3) ** 2
            search.tell(None if len(seen) == 4 else loss)
            seen.append((loss, dict(settings)))
        return seen

    first = walk()
    assert len(first) == 25 and first == walk()
    assert min(loss for loss, _ in first) < 0.1
