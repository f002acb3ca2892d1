"""Full fine-tuning with little memory: as a plain run where nothing is rounded, resumed exactly, errors by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from tests.support.data import read_json, read_json_lines, write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

LITTLE: dict[str, Any] = {"master_weights": "bfloat16", "optimizer_in_backward": True}
RATE = {"learning_rate": 1e-3}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_talk(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


def recipe_of(folder: Path, conversations: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    training = {**RATE, **sections.pop("training", {})}
    return write_training_recipe(
        folder / "recipe.yaml", small_model(tied=True), conversations, None, folder / "run",
        **{"method": "full", "training": training, **sections},
    )  # fmt: skip


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]


def test_updates_in_the_backward_pass_are_those_of_a_plain_run(tmp_path: Path, conversations: Path) -> None:
    plain = recipe_of(tmp_path / "plain", conversations, training={"max_grad_norm": 0})
    freed = recipe_of(tmp_path / "freed", conversations, training={"optimizer_in_backward": True})
    train(load_recipe(plain))
    summary = train(load_recipe(freed))
    ours, stock = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("freed", "plain"))
    for name, weight in stock.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)
    lines = [read_json_lines(tmp_path / name / "run" / "metrics.jsonl") for name in ("freed", "plain")]
    for one, other in zip(*([line for line in part if "loss" in line] for part in lines), strict=True):
        assert one["loss"] == other["loss"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert summary.optimizer_in_backward and summary.master_weights == "float32"
    assert summary.memory_bytes is not None
    assert 0 < summary.memory_bytes.gradients < summary.memory_bytes.trained_weights


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit"])
def test_a_resumed_run_in_bfloat16_is_the_uninterrupted_one(tmp_path: Path, conversations: Path, optim: str) -> None:
    settings = {**LITTLE, "optim": optim, "save_strategy": "steps", "save_steps": 2}
    model = {"dtype": "bfloat16", "compute_dtype": "float32"}
    whole = recipe_of(tmp_path / "whole", conversations, training=settings, model=model)
    train(load_recipe(whole))
    parted = recipe_of(tmp_path / "parted", conversations, training=settings, model=model)
    train(load_recipe(parted, ["training.max_steps=2"]))
    summary = train(load_recipe(parted), TrainOptions(resume=True))
    ours, other = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("parted", "whole"))
    assert all(weight.dtype == torch.bfloat16 for weight in ours.values())
    for name, weight in other.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)
    written = read_json(tmp_path / "parted" / "run" / "run.json")
    assert (written["optimizer"], written["master_weights"], written["optimizer_in_backward"]) == (
        optim, "bfloat16", True,
    )  # fmt: skip
    assert summary.memory_bytes is not None
    assert summary.memory_bytes.trained_weights == 2 * sum(weight.numel() for weight in ours.values())


def test_bfloat16_learns_as_float32(tmp_path: Path, conversations: Path) -> None:
    """At a rate at which rounding to nearest would lose most of each update."""
    settings = {"max_steps": 12, "max_grad_norm": 0}
    wide = recipe_of(tmp_path / "wide", conversations, training=settings, model={"dtype": "bfloat16"})
    narrow = recipe_of(tmp_path / "narrow", conversations, training={**settings, **LITTLE}, model={"dtype": "bfloat16"})
    train(load_recipe(wide, ["model.compute_dtype=float32"]))
    train(load_recipe(narrow, ["model.compute_dtype=float32"]))
    ours, stock = losses(tmp_path / "narrow" / "run"), losses(tmp_path / "wide" / "run")
    assert stock[-1] < 0.95 * stock[0]
    assert ours == pytest.approx(stock, rel=0.01)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"training": {**LITTLE, "max_grad_norm": 1.0}}, "max_grad_norm", "freed before the norm"),
    ({"training": {**LITTLE, "gradient_accumulation_steps": 2}}, "gradient_accumulation_steps", "added"),
    ({"training": {**LITTLE, "on_spike": "skip"}}, "on_spike", "before the step is judged"),
    ({"training": {**LITTLE, "on_oom": "halve"}}, "on_oom", "updated already"),
    ({"training": {**LITTLE, "torch_compile": True}}, "torch_compile", "not compiled"),
    ({"method": "lora", "training": LITTLE}, "master_weights", "an adapter's weights"),
    ({"method": "lora", "training": {"optimizer_in_backward": True}}, "optimizer_in_backward", "adapter's gradients"),
    ({"distributed": {"strategy": "zero3"}, "training": LITTLE}, "master_weights", "DeepSpeed"),
    ({"distributed": {"strategy": "ddp"}, "training": LITTLE}, "optimizer_in_backward", "average"),
    ({"distributed": {"processes": 2}, "training": LITTLE}, "optimizer_in_backward", "average"),
    ({"model": {"dtype": "float32"}, "training": LITTLE}, "master_weights", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "key", "why"), REFUSED)
def test_what_cannot_be_honored_is_refused_by_its_key(
    tmp_path: Path, conversations: Path, sections: dict[str, Any], key: str, why: str
) -> None:
    training = {"gradient_accumulation_steps": 1, **sections.get("training", {})}
    path = recipe_of(tmp_path, conversations, **{"model": {"dtype": "bfloat16"}, **sections, "training": training})
    with pytest.raises(UserError) as refused:
        load_recipe(path)
    assert f"training.{key}" in str(refused.value)
    assert why in str(refused.value)
