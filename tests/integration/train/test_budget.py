"""Budgets end a run where they say, and the schedule follows them."""

from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train as train_run
from tests.support.data import read_json_lines, write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = small_model()
    conversations = write_small_talk(tmp_path / "train.jsonl")
    settings = {"max_steps": -1, "num_train_epochs": 50.0, "lr_scheduler_type": "linear", "warmup_steps": 0.25}
    return write_training_recipe(
        tmp_path / "recipe.yaml", model, conversations, None, tmp_path / "run", training=settings
    )


def train(recipe: Path, *flags: str, resume: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    loaded = load_recipe(recipe, ["training.learning_rate=0.01", "distributed.strategy=single", *flags])
    summary = train_run(loaded, TrainOptions(resume=resume)).model_dump()
    return summary, read_json_lines(Path(loaded.recipe.output_dir) / "metrics.jsonl")


def test_a_token_budget_ends_with_the_step_that_uses_it_up(recipe: Path) -> None:
    summary, lines = train(recipe, "training.max_train_tokens=1500")
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert summary["steps"] == len(rates)
    assert 1500 <= summary["tokens"] < 1500 + 2 * 128
    # Up over a quarter of the budget, and down to its end, though the schedule was laid out over fifty epochs.
    top = rates.index(max(rates))
    assert top == pytest.approx(0.25 * len(rates), abs=1.01)
    assert max(rates) > 0.008
    assert rates[-1] < 0.0035
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_a_resumed_run_has_only_the_rest_of_its_budget(recipe: Path) -> None:
    saving = ["training.save_strategy=steps", "training.save_steps=1"]
    first, _ = train(recipe, "training.max_train_tokens=600", *saving)
    both, lines = train(recipe, "training.max_train_tokens=1500", *saving, resume=True)
    assert 600 <= first["tokens"] < 1500 <= both["tokens"] < 1500 + 2 * 128
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, both["steps"] + 1))


def test_minutes_are_those_of_training(recipe: Path) -> None:
    summary, _ = train(recipe, "training.max_train_minutes=0.01")
    slowest = 2.0
    assert 0.6 <= summary["seconds"] < 0.6 + slowest
    assert summary["steps"] < 50 * 12


def test_steps_may_end_a_run_before_its_budget(recipe: Path) -> None:
    summary, _ = train(recipe, "training.max_steps=2", "training.max_train_tokens=1000000")
    assert summary["steps"] == 2


def test_a_warm_up_in_steps_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match="fraction below 1"):
        load_recipe(recipe, ["training.max_train_tokens=1000", "training.warmup_steps=10"])
