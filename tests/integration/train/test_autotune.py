"""Autotuning: what it measures leaves training as it was, is kept, and is what a resumed run goes on with."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftchat.recipe import load_recipe
from peftchat.runs.run_summary import RunSummary
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from tests.support.data import read_json, read_json_lines, write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

# The compiler would take longer than all other tests; its layers have tests of their own.
MEASURED = {"learning_rate": 1e-3, "torch_compile": False, "autotune": True}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_talk(tmp_path_factory.mktemp("data") / "train.jsonl", 24)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCHAT_CACHE", str(tmp_path / "cache"))


def trained(
    folder: Path, conversations: Path, *, resume: bool = False, dropout: float = 0.0, **training: Any
) -> tuple[RunSummary, Path]:
    folder.mkdir(exist_ok=True)
    path = write_training_recipe(
        folder / "recipe.yaml", small_model(tied=True), conversations, None, folder / "run",
        adapter={"dropout": dropout}, training={**MEASURED, **training},
    )  # fmt: skip
    if "per_device_train_batch_size" not in training:
        recipe = read_json(path)  # Its own value is the default too, which leaves the micro-batch open.
        del recipe["training"]["per_device_train_batch_size"]
        path.write_text(json.dumps(recipe), encoding="utf-8")
    return train(load_recipe(path), TrainOptions(resume=resume)), folder / "run"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]


def test_measuring_leaves_training_as_it_was(tmp_path: Path, conversations: Path) -> None:
    """Dropout draws random numbers in every step, and a pass over data that is trained later must not show."""
    measured, one = trained(tmp_path / "measured", conversations, dropout=0.3)
    plain, other = trained(tmp_path / "plain", conversations, dropout=0.3, autotune=False)
    assert measured.auto_settings
    # Rows of another shape would draw other random numbers.
    assert "model.attention" not in {setting.key for setting in measured.auto_settings}
    assert all("measured here" in setting.reason for setting in measured.auto_settings)
    assert not plain.auto_settings
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    if read_json(one / "choices.json") == read_json(other / "choices.json"):
        assert losses(one) == losses(other)


def test_a_kept_measurement_serves_the_next_run_and_a_resumed_run_goes_on_as_it_began(
    tmp_path: Path, conversations: Path
) -> None:
    first, run = trained(tmp_path / "first", conversations, max_steps=2, save_strategy="steps", save_steps=2)
    assert {"model.attention"} <= {setting.key for setting in first.auto_settings}
    began = read_json(run / "choices.json")
    (kept,) = (tmp_path / "cache" / "choices").iterdir()
    content = read_json(kept)
    assert content["versions"]["torch"]
    assert content["measurement"]["chosen"] == began

    # What is kept decides, however short the next run is and whatever it would measure.
    content["measurement"]["chosen"] = {**began, "loss_chunk": 4.0, "fused_adapter": not began["fused_adapter"]}
    kept.write_text(json.dumps(content), encoding="utf-8")
    _, second = trained(tmp_path / "second", conversations, autotune=None)
    assert read_json(second / "choices.json") == content["measurement"]["chosen"]
    assert losses(second)[:2] == pytest.approx(losses(run), rel=1e-5)

    # A way that no run has tried is tried by one that has the time.
    removed = content["measurement"]["ratios"].popitem()[0]
    kept.write_text(json.dumps(content), encoding="utf-8")
    trained(tmp_path / "fourth", conversations, max_steps=1)
    assert removed in read_json(kept)["measurement"]["ratios"]

    # But a run goes on as it began.
    resumed, run = trained(tmp_path / "first", conversations, resume=True, max_steps=4)
    assert read_json(run / "choices.json") == began
    assert resumed.steps == 4
    assert first.steps == 2

    # What cannot be read is measured again.
    kept.write_text("{", encoding="utf-8")
    trained(tmp_path / "third", conversations, max_steps=1)
    assert read_json(kept)["measurement"]["default"]


def test_steps_in_other_micro_batches_train_the_same(tmp_path: Path, conversations: Path) -> None:
    """Also where an epoch ends within a step, and where a run goes on within an epoch."""
    longer = {"gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, plain = trained(tmp_path / "plain", conversations, autotune=False, max_steps=7, **longer)
    folder = tmp_path / "cut"
    _, run = trained(folder, conversations, autotune=None, max_steps=2, **longer)
    # A run goes on with the micro-batches of its choice, but not where the recipe names others.
    joined = {**read_json(run / "choices.json"), "micro_batch": 4}
    for until, named, size in ((5, {}, 4), (7, {"per_device_train_batch_size": 2}, 2)):
        (run / "choices.json").write_text(json.dumps(joined), encoding="utf-8")
        trained(folder, conversations, resume=True, autotune=None, max_steps=until, **longer, **named)
        assert read_json(run / "choices.json")["micro_batch"] == size
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def test_nothing_is_tried_that_memory_may_not_hold(
    tmp_path: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation on a CPU does not fail: the system ends the process instead, and the run with it."""
    left = psutil.virtual_memory()._replace(available=2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: left)
    summary, _ = trained(tmp_path / "small", conversations, gradient_accumulation_steps=2, max_steps=1)
    tried = {setting.key: setting.reason for setting in summary.auto_settings}
    assert "sdpa" in tried["model.attention"] and "eager" not in tried["model.attention"]
    assert ", 1 " in tried["training.per_device_train_batch_size"]
    assert ", 4 " not in tried["training.per_device_train_batch_size"]


def test_short_runs_measure_nothing(tmp_path: Path, conversations: Path) -> None:
    summary, _ = trained(tmp_path / "short", conversations, autotune=None, max_steps=1)
    assert not summary.auto_settings
    assert not (tmp_path / "cache" / "choices").exists()
