"""Mixtures drawn again in each epoch: the same conversations at the same steps, in one sitting or in two."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import peftchat
from tests.support.data import read_json, read_json_lines, write_small_talk
from tests.support.launch import peftchat_in_processes
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


def recipe_with(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    many, few = write_small_talk(tmp_path / "many.jsonl", 40), write_small_talk(tmp_path / "few.jsonl", 12, seed=5)
    data = {"train": [{"path": str(many), "weight": 0.4}, {"path": str(few), "weight": 1.5}], "resample": True}
    training = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **changes.pop("training", {}),
    }  # fmt: skip
    run = tmp_path / "run"
    data |= changes.pop("data", {})
    recipe = write_training_recipe(
        tmp_path / "r.yaml", small_model(tied=True), many, None, run, data=data, training=training, **changes
    )
    return recipe, run


def steps_of(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_json_lines(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("processes", "packing", "workers", "kept"),
    [(1, True, 1, 7), pytest.param(2, False, 0, 5, marks=pytest.mark.distributed)],
)
def test_resumed_equals_uninterrupted(processes: int, packing: bool, workers: int, kept: int, tmp_path: Path) -> None:
    """Bit for bit, from the middle of the second epoch on."""
    strategy = "single" if processes == 1 else "ddp"
    batch = 4 if processes == 2 else 1
    recipe, run = recipe_with(
        tmp_path,
        data={"packing": packing},
        training={"dataloader_num_workers": workers, "per_device_train_batch_size": batch, "save_steps": kept},
        distributed={"strategy": strategy, "processes": processes},
    )
    done = peftchat_in_processes(processes, "train", recipe)
    assert done.returncode == 0, done.stderr
    assert "drawn again in each epoch: 34 examples (16 of 40 of" in done.stderr
    whole, summary = steps_of(run), read_json(run / "run.json")
    assert summary["examples_per_epoch"] == 34
    assert summary["train_examples"] == 52
    assert any("drawn again" in note for note in summary["notes"])
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.rsplit("-", 1)[1]) > kept:
            shutil.rmtree(checkpoint)
    (run / "run.json").unlink()
    done = peftchat_in_processes(processes, "train", recipe, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"step {kept}/8" not in done.stderr
    assert steps_of(run) == whole
    assert read_json(run / "run.json")["tokens"] == summary["tokens"]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    recipe, run = recipe_with(tmp_path, data={"eval_fraction": 0.1})
    whole = peftchat("train", recipe, "--set", "data.train.0.weight=1", "--set", "data.train.1.weight=2")
    assert whole.returncode == 2
    assert "every `weight` is a whole number" in whole.stderr
    compared = peftchat("compare", recipe, "--variants", "lora,dora", "-o", tmp_path / "comparison")
    assert compared.returncode == 2
    assert "data.resample=false" in compared.stderr
    assert not run.exists()
    assert not (tmp_path / "comparison").exists()


def test_steps_and_shares_are_told_before_training(tmp_path: Path) -> None:
    recipe, run = recipe_with(tmp_path, training={"max_steps": -1, "num_train_epochs": 3, "save_strategy": "no"},
                              data={"packing": False})  # fmt: skip
    for key in ("save_steps", "save_total_limit"):
        recipe.write_text(recipe.read_text().replace(f'"{key}": {1 if key == "save_steps" else 9}, ', ""))
    # 34 examples, two to a step.
    for epochs, steps, told in (
        (3, "51 (17 per epoch)", "drawn again in each epoch"),
        (1, "17 (17 per epoch)", "nothing is drawn a second time"),
    ):
        dry = peftchat("train", recipe, "--dry-run", "--set", f"training.num_train_epochs={epochs}")
        assert dry.returncode == 0, dry.stderr
        said = " ".join((dry.stdout + dry.stderr).split())
        assert steps in said
        assert told in said
    assert not run.exists()
