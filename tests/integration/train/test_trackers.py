"""Trackers get metrics, recipe, samples and the place of the report, and cannot stop a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from tests.support.data import read_json, write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


def trained(folder: Path, **sections: Any) -> Any:
    data = write_small_talk(folder / "talk.jsonl")
    recipe = write_training_recipe(
        folder / "recipe.yaml", small_model(tied=True), data, data, folder / "run",
        training={"report_to": ["tensorboard"], "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
        **sections,
    )  # fmt: skip
    return train(load_recipe(recipe), TrainOptions())


def test_tensorboard_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "run/tensorboard"))
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanary")
    monkeypatch.setenv("WANDB_API_KEY", "canarycanary")
    trained(tmp_path, evaluation={"questions": ["to saw?"], "max_new_tokens": 3})
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert {"train/loss", "eval/loss", "train/grad_norm"} <= set(events.Tags()["scalars"])
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}

    def text(tag: str) -> str:
        return texts[f"{tag}/text_summary"][0].tensor_proto.string_val[0].decode()

    assert text("report") == str(tmp_path / "run/report.html")
    assert (tmp_path / "run/recipe.yaml").read_text() in text("recipe")
    assert [one.step for one in texts["samples/text_summary"]] == [0, 1, 2]
    assert text("samples").startswith("**to saw?**")
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert left == [], "keys of the environment"


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_is_left_alone_with_one_note(
    event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(event)
        raise ConnectionError("no route to the tracker\nmore")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    summary = trained(tmp_path)
    assert calls == [event]
    note = "tensorboard failed and gets nothing more; the run goes on without it: no route to the tracker"
    assert [line for line in summary.notes if "tensorboard" in line] == [note]
    assert summary.steps == 2 and note in read_json(tmp_path / "run/run.json")["notes"]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]
