"""Losses, gradients and weights that are not finite, or that do not move."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.data import read_json
from tests.support.faults import Fault, Scene, no_model, resume

PROMISE = "Numbers are watched at every step"


def rate(scene: Scene, learning_rate: float, method: str = "lora", **training: object) -> None:
    settings = {"learning_rate": learning_rate, "max_grad_norm": 0, "logging_steps": 10, "max_steps": 5, **training}
    scene.sections |= {"method": method, "training": settings}


def spoil_checkpoint(scene: Scene) -> None:
    """Put NaN into a complete checkpoint of an older version, which has no digests; its files keep their sizes."""
    scene.sections |= {"training": {"save_strategy": "steps", "save_steps": 2}}
    scene.train()
    for file in (scene.run / "checkpoints").glob("*/adapter_model.safetensors"):
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
        marker = file.with_name("complete.json")
        marker.write_text(json.dumps({key: value for key, value in read_json(marker).items() if key != "digests"}))


def anything(scene: Scene) -> None:
    """The finished model of before stays."""
    assert read_json(scene.run / "run.json")["steps"] == 4


def no_checkpoint(scene: Scene) -> None:
    no_model(scene)
    assert not list(scene.run.rglob("complete.json"))


FAULTS = (
    Fault("NaN between logged steps", PROMISE, lambda scene: rate(scene, 1e38, "full"),
          ("step 2: the loss is", "train.jsonl:", "learning_rate (1.00e38)", "no model was saved"), 1, after=no_model),
    Fault("a checkpoint of weights that overflowed", PROMISE,
          lambda scene: rate(scene, 1e38, save_strategy="steps", save_steps=1),
          ("Failed: ", "There is no checkpoint yet"), 1, after=no_checkpoint),
    Fault("a rate below the end of its schedule", PROMISE,
          lambda scene: rate(scene, 1e-8, lr_scheduler_type="polynomial"),
          ("lr_scheduler_type: polynomial: the schedule cannot be made", "lr_end")),
    Fault("a schedule that fails in the middle of the run", PROMISE,
          lambda scene: rate(scene, 1e-3, lr_scheduler_type="inverse_sqrt", lr_scheduler_kwargs={"timescale": 0}),
          ("lr_scheduler_type: inverse_sqrt", "the rate of step 2 cannot be computed")),
    Fault("a schedule above the rate of the recipe", PROMISE,
          lambda scene: rate(
              scene, 1e-3, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 2}
          ),
          ("the schedule cannot be made", "times training.learning_rate")),
    Fault("a decay longer than the run", PROMISE,
          lambda scene: rate(
              scene, 1e-3, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 100}
          ),
          ("the schedule cannot be made", "times training.learning_rate at most")),
    Fault("NaN in a complete checkpoint", PROMISE, spoil_checkpoint,
          ("is not finite", "checkpoint-4", "Delete this folder"), 2, resume, anything),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_numbers(fault: Fault, tmp_path: Path) -> None:
    fault.check(tmp_path)


def test_one_step_with_a_warm_up_moves_every_token_that_occurs(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    scene.sections = {"training": {"max_steps": 1, "lr_scheduler_type": "cosine"}}
    scene.train()
    tokens = read_json(scene.run / "run.json")["new_tokens"]
    assert all(token["input_moved"] > 0 for token in tokens if token["seen"])


def test_a_longer_schedule_is_told_and_recorded(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    training = {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 4}
    scene.sections = {"training": training}
    scene.train()
    scene.sections = {"training": {**training, "max_steps": 8}}
    said = scene.train("--resume").stderr
    (note,) = read_json(scene.run / "run.json")["notes"]
    assert "from step 4 to 8" in note
    assert "learning rate goes from 0 to 0.00" in note
    assert said.count(note) == 1
