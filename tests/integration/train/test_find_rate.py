"""The search of a learning rate: each short run is a run of its own, and nothing but one file is left."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.recipe import load_recipe
from peftchat.training.distributed import resolve_distributed
from peftchat.training.rate_search import ShortRuns, short_training
from peftchat.training.train import train
from tests.support.data import read_json
from tests.support.in_process import peftchat_in_process
from tests.support.models import small_model
from tests.support.pairs import pair_recipe, write_labels, write_pairs
from tests.support.recipes import write_training_recipe


@pytest.fixture
def recipe(tmp_path: Path, conversations: Path, held_out: Path) -> Any:
    def write(evaluation: Path | None = held_out, **sections: Any) -> Path:
        return write_training_recipe(
            tmp_path / "recipe.yaml", small_model(), conversations, evaluation, tmp_path / "run", **sections
        )

    return write


@pytest.mark.parametrize("adapter", [{"variant": "lora", "dropout": 0.1}, {"variant": "adalora"}, None])
def test_a_short_run_is_the_run_of_that_rate_and_does_not_depend_on_those_before(
    recipe: Any, tmp_path: Path, adapter: dict[str, Any] | None
) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    chosen: dict[str, Any] = {"method": "full"} if adapter is None else {"adapter": adapter}
    file = recipe(training=settings, **chosen)
    loaded = load_recipe(file)
    runs = ShortRuns(loaded, resolve_distributed(loaded), tmp_path / "short", 6)
    runs.train(1.0)
    trial = runs.train(1e-2)
    summary = train(loaded)
    assert trial.loss == pytest.approx(summary.eval_loss, rel=1e-6)
    assert runs.loss_before == pytest.approx(summary.eval_loss_before, rel=1e-6)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line and "eval_loss" not in line]
    assert trial.train_losses == pytest.approx(losses[:6], rel=1e-5)


@pytest.mark.parametrize(("objective", "method"), [("dpo", "full"), ("kto", "lora")])
def test_a_short_run_of_pairs_is_the_run_of_that_rate(objective: str, method: str, tmp_path: Path) -> None:
    """Behind another run, whose reference it takes over; what is added to the loss of pairs is in it."""
    write = write_labels if objective == "kto" else write_pairs
    files = write(tmp_path / "train.jsonl", 8), write(tmp_path / "eval.jsonl", 7, 3)
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    options = {"dpo": {"dpo": {"rpo_alpha": 0.5}}, "kto": {}}[objective]
    file = pair_recipe(
        tmp_path, small_model(), *files, objective=objective, method=method, training=training, **options
    )  # fmt: skip
    loaded = load_recipe(file)
    runs = ShortRuns(loaded, resolve_distributed(loaded), tmp_path / "short", 4)
    runs.train(1.0)
    trial = runs.train(1e-2)
    summary = train(loaded)
    told = summary.eval_pairs or summary.eval_labels
    assert trial.loss == pytest.approx(summary.eval_loss, rel=1e-5)
    assert runs.loss_before == pytest.approx(summary.eval_loss_before, rel=1e-6)
    assert told is not None and trial.right == told.right and len(trial.held_out) == 7
    assert "% right" in str(trial)


def test_the_schedule_of_a_short_run_is_that_of_the_whole_run(recipe: Any) -> None:
    training = load_recipe(
        recipe(training={"warmup_steps": 30, "max_steps": 300, "lr_scheduler_type": "cosine"})
    ).recipe.training
    short = short_training(training, 1e-3, 40, 300)
    assert (short.warmup_steps, short.max_steps, short.learning_rate) == (4, 40, 1e-3)
    options = {"num_decay_steps": 100, "min_lr_ratio": 0.1}
    whole = training.model_copy(update={"lr_scheduler_kwargs": options, "warmup_steps": 0.1})
    short = short_training(whole, 1e-3, 40, 300)
    assert short.lr_scheduler_kwargs == {"num_decay_steps": 14, "min_lr_ratio": 0.1}
    assert short.warmup_steps == 0.1


def test_the_command_leaves_one_file_and_the_run_can_follow(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(None, training={"learning_rate": "auto", "max_steps": 3})
    done = peftchat_in_process(capsys, "train", file, "--find-lr", "--find-lr-steps", 5, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["find_lr.json"]
    assert read_json(tmp_path / "run" / "find_lr.json") == said
    rates = [trial["learning_rate"] for trial in said["trials"]]
    assert len(rates) >= 7
    assert rates == sorted(rates)
    assert rates[0] <= said["learning_rate"] <= rates[-1]
    lowest = min(trial["eval_loss"] for trial in said["trials"] if trial["eval_loss"] is not None)
    near = [one for one in said["trials"] if one["eval_loss"] == lowest]
    assert near[0]["above_lowest"] == 0
    train(load_recipe(file, ["training.learning_rate=1e-3"]))
    assert (tmp_path / "run" / "find_lr.json").is_file()


def test_what_cannot_be_combined_is_refused(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe()
    for options, named in (
        (["--find-lr", "--resume"], "--resume"),
        (["--find-lr", "--dry-run"], "--dry-run"),
        (["--find-lr", "--prompt", "Hi"], "--prompt"),
        (["--json"], "--json"),
        (["--find-lr-steps", "9"], "--find-lr-steps"),
        (["--find-lr", "--set", "distributed.processes=2"], "one process"),
    ):
        done = peftchat_in_process(capsys, "train", file, *options)
        assert done.returncode == 2
        assert named in done.stderr
        assert not done.stdout
        assert not (tmp_path / "run").exists()
