"""The weights of the best evaluation, and early stopping: kept exactly, over a resume too."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from tests.support.cli import peftchat
from tests.support.data import read_json, read_json_lines, write_conversations
from tests.support.launch import peftchat_in_processes
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_loss, stock_run

# The held-out loss falls for some steps, then rises by many times what rounding differs between processors.
OVERFIT = {"max_steps": 12, "learning_rate": 6e-3, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
BEST = {**OVERFIT, "load_best_model_at_end": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One answer to train on; held-out answers of which that one is learned first, and the others are lost later."""
    folder = tmp_path_factory.mktemp("data")
    train_file = write_conversations(folder / "train.jsonl", [said(f"Say {number}", "a" * 12) for number in range(8)])
    held_out = [
        said("Name a river.", "The Loire runs to the sea."),
        said("And a hill?", "Ben Nevis is one."),
        said("Say it", "a" * 5),
    ]
    return train_file, write_conversations(folder / "eval.jsonl", held_out)


def said(question: str, answer: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)]


def trained(run: Path, data: tuple[Path, Path], method: str = "lora", *, resume: bool = False, **training: Any) -> Any:
    recipe = write_training_recipe(
        run.parent / f"{run.name}.yaml", small_model(tied=True), *data, run, method=method, training=training
    )
    return train(load_recipe(recipe), TrainOptions(resume=resume))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    return load_file(str(folder / name))


def evaluations(run: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in read_json_lines(run / "metrics.jsonl") if "eval_loss" in line}


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_run_folder_holds_the_weights_of_the_lowest_held_out_loss(
    method: str, tmp_path: Path, data: tuple[Path, Path]
) -> None:
    summary = trained(tmp_path / "best", data, method, **BEST)
    losses = evaluations(tmp_path / "best")
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert 0 < best < 12, losses
    assert summary.kept is not None and summary.eval_loss == losses[best]
    assert (summary.kept.step, summary.kept.value, summary.kept.last_value) == (best, losses[best], losses[12])
    assert any(f"step {best}" in note for note in summary.notes)
    # A run that ends there has the same weights.
    trained(tmp_path / "short", data, method, **{**OVERFIT, "max_steps": best})
    assert same(tmp_path / "best", tmp_path / "short")


def test_the_best_checkpoint_outlives_later_ones(tmp_path: Path, data: tuple[Path, Path]) -> None:
    """However few are kept, and whether or not checkpoints are written at all."""
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    summary = trained(tmp_path / "steps", data, **BEST, **settings)
    kept = sorted(path.name for path in (tmp_path / "steps/checkpoints").iterdir())
    assert kept == sorted([f"checkpoint-{summary.kept.step}", "checkpoint-12"])
    trained(tmp_path / "no", data, **BEST)
    assert same(tmp_path / "steps", tmp_path / "no")


def test_resumed_it_keeps_what_an_uninterrupted_run_keeps(tmp_path: Path, data: tuple[Path, Path]) -> None:
    stopping = {**BEST, "early_stopping_patience": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    whole = trained(tmp_path / "whole", data, **stopping)
    assert whole.kept.stopped_early and whole.steps == whole.kept.step + 4 < 12
    # Interrupted after each checkpoint: before, at and behind the best step.
    for step in range(2, whole.steps, 2):
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", run)
        for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
            (run / name).unlink()
        for later in range(step + 2, 13, 2):
            shutil.rmtree(run / f"checkpoints/checkpoint-{later}", ignore_errors=True)
        resumed = trained(run, data, resume=True, **stopping)
        assert (resumed.steps, resumed.kept) == (whole.steps, whole.kept)
        assert same(run, tmp_path / "whole")
        assert evaluations(run) == evaluations(tmp_path / "whole")


def test_a_best_checkpoint_that_is_gone_is_told(tmp_path: Path, data: tuple[Path, Path]) -> None:
    settings = {**BEST, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    whole = trained(tmp_path / "run", data, **settings)
    run, best = tmp_path / "run", whole.kept.step
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (run / name).unlink()
    shutil.rmtree(run / f"checkpoints/checkpoint-{best}")
    shutil.rmtree(run / "checkpoints/checkpoint-12")
    resumed = trained(run, data, resume=True, **settings)
    assert any(f"after step {best}, is gone" in note for note in resumed.notes)
    assert resumed.kept.step == 12


def test_early_stopping_alone_keeps_the_last_weights(tmp_path: Path, data: tuple[Path, Path]) -> None:
    summary = trained(tmp_path / "run", data, **OVERFIT, early_stopping_patience=2)
    losses = evaluations(tmp_path / "run")
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert summary.steps == best + 4 and summary.kept.stopped_early
    assert (summary.kept.step, summary.eval_loss) == (summary.steps, losses[summary.steps])
    # Early stopping may also begin when a run is resumed.
    begun = {**OVERFIT, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "later", data, **begun)
    later = trained(tmp_path / "later", data, resume=True, **{**begun, "max_steps": 12, "early_stopping_patience": 2})
    assert later.steps <= summary.steps + 2


@pytest.mark.distributed
def test_sharded_weights_of_the_best_step_are_loaded(tmp_path: Path, data: tuple[Path, Path]) -> None:
    """The run folder's weights give, in stock transformers, the held-out loss of the best step."""
    run, base = tmp_path / "run", small_model(tied=True)
    recipe = write_training_recipe(
        tmp_path / "r.yaml", base, *data, run, method="full",
        training={**BEST, "max_steps": 6}, distributed={"strategy": "zero3", "processes": 2},
    )  # fmt: skip
    done = peftchat_in_processes(2, "train", recipe)
    assert done.returncode == 0, done.stderr
    kept, losses = read_json(run / "run.json")["kept"], evaluations(run)
    assert kept["step"] < 6 and kept["value"] == min(losses[step] for step in (2, 4, 6))
    model, tokenizer = stock_run(run, base, "full", None)
    assert stock_loss(model, tokenizer, data[1]) == pytest.approx(kept["value"], rel=1e-5)


def test_the_highest_accuracy_may_decide(tmp_path: Path, data: tuple[Path, Path]) -> None:
    summary = trained(tmp_path / "run", data, **BEST, metric_for_best_model="accuracy")
    found = {
        line["step"]: line["eval_accuracy"]
        for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")
        if line.get("step") and "eval_accuracy" in line
    }
    assert summary.kept.value == max(found.values()) == found[summary.kept.step]
    assert read_json(tmp_path / "run/run.json")["kept"]["metric"] == "eval_accuracy"


@pytest.mark.parametrize(
    ("training", "says"),
    [
        (
            {**BEST, "eval_strategy": "no", "eval_steps": None},
            "model_at_end: has no effect: `eval_strategy` is `no`",
        ),
        ({"early_stopping_threshold": 0.1}, "`early_stopping_patience` is not set"),
        ({"metric_for_best_model": "eval_accuracy"}, "neither `load_best_model_at_end` nor `early_stopping_patience`"),
        ({**BEST, "metric_for_best_model": "bleu"}, "`eval_loss`, `eval_accuracy`, got the text `bleu`"),
        ({**BEST, "early_stopping_patience": 0}, "early_stopping_patience"),
        ({**BEST, "greater_is_better": False}, "It follows from `metric_for_best_model`"),
    ],
)
def test_a_setting_without_effect_is_one_message(
    training: dict[str, Any], says: str, tmp_path: Path, data: tuple[Path, Path]
) -> None:
    recipe = write_training_recipe(
        tmp_path / "r.yaml", small_model(tied=True), *data, tmp_path / "run", training=training
    )
    done = peftchat("train", recipe)
    assert done.returncode == 2 and done.stderr.count("Error:") == 1, done.stderr
    assert says in done.stderr
    assert not (tmp_path / "run").exists()
