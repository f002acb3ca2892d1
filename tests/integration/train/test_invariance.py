"""What must not depend on how a run is cut up: into micro-batches, into packs, into two sittings."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cli import peftchat, start
from tests.support.data import read_json, read_json_lines, write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as many as elsewhere."""
    return write_small_talk(tmp_path_factory.mktemp("data") / "train.jsonl", 48)


def trained(tmp_path: Path, name: str, conversations: Path, **sections: Any) -> Path:
    run = tmp_path / name
    base = small_model(tied=True)
    recipe = write_training_recipe(tmp_path / f"{name}.yaml", base, conversations, None, run, **sections)
    done = peftchat("train", recipe)
    assert done.returncode == 0, done.stderr
    return run


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (run / "adapter_config.json").is_file() else "model.safetensors"
    return load_file(str(run / name))


def test_accumulation_equals_the_larger_batch(tmp_path: Path, conversations: Path) -> None:
    """Examples carry very different numbers of targets: averaging per micro-batch would show at once."""
    shape = {"adapter": {"dropout": 0.0}, "data": {"packing": False, "max_length": 128}}
    runs = [
        trained(
            tmp_path, f"b{batch}", conversations, **shape,
            training={"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch},
        )
        for batch in (8, 2, 1)
    ]  # fmt: skip
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-5)
        for name, tensor in weights(run).items():
            assert (tensor - weights(runs[0])[name]).abs().max() < 2e-4


def test_packing_trains_like_padding(tmp_path: Path, conversations: Path) -> None:
    """One step over all examples: the loss and the update are the same, however the examples are laid out."""
    shape = {"adapter": {"dropout": 0.0}}
    batch = {"per_device_train_batch_size": 48, "max_steps": 2, "learning_rate": 1e-3}
    masked = {"model": {"attention": "sdpa", "dtype": "float32"}}
    padded = trained(tmp_path, "padded", conversations, **shape, **masked, data={"packing": False}, training=batch)
    packed = trained(tmp_path, "packed", conversations, **shape, data={"packing": True}, training=batch)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    assert read_json(packed / "run.json")["tokens"] == read_json(padded / "run.json")["tokens"]
    assert read_json(packed / "run.json")["padding_fraction"] < read_json(padded / "run.json")["padding_fraction"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_equals_uninterrupted(method: str, tmp_path: Path, conversations: Path) -> None:
    """Killed without warning behind a checkpoint and resumed, a run ends where it would have ended."""
    settings = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 4,
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
    }
    whole = trained(tmp_path, "whole", conversations, method=method, training=settings)

    run = tmp_path / "killed"
    recipe = write_training_recipe(
        tmp_path / "killed.yaml", small_model(tied=True), conversations, None, run, method=method, training=settings
    )
    process = start("-m", "peftchat", "train", recipe)
    marker = run / "checkpoints" / "checkpoint-4" / "complete.json"
    deadline = time.monotonic() + 240
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert marker.exists()
    # A checkpoint that was being written when the kill came must not be trusted.
    torn = run / "checkpoints" / "checkpoint-9"
    shutil.copytree(run / "checkpoints" / "checkpoint-4", torn)
    (torn / "complete.json").unlink()
    (run / "run.json").unlink(missing_ok=True)

    refused = peftchat("train", str(recipe))
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = peftchat("train", str(recipe), "--resume")
    assert done.returncode == 0, done.stderr

    steps = [line["step"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(whole)[name], atol=1e-5, rtol=1e-4)
    one, other = read_json(run / "run.json"), read_json(whole / "run.json")
    for key in ("tokens", "supervised_tokens", "steps"):
        assert one[key] == other[key]
    assert [token["seen"] for token in one["new_tokens"]] == [token["seen"] for token in other["new_tokens"]]


def test_resume_without_a_checkpoint_starts_from_scratch(tmp_path: Path, conversations: Path) -> None:
    run = tmp_path / "run"
    recipe = write_training_recipe(tmp_path / "recipe.yaml", small_model(tied=True), conversations, None, run)
    done = peftchat("train", recipe, "--resume")
    assert done.returncode == 0, done.stderr
    assert read_json(run / "run.json")["steps"] == 4


def test_the_resolved_recipe_runs_again(tmp_path: Path, conversations: Path) -> None:
    first = trained(tmp_path, "first", conversations)
    done = peftchat("train", str(first / "recipe.yaml"), "--set", f"output_dir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == losses(first)
    assert weights(tmp_path / "again").keys() == weights(first).keys()


def test_a_resume_with_another_recipe_is_refused(tmp_path: Path, conversations: Path) -> None:
    run = trained(tmp_path, "run", conversations, training={"save_strategy": "steps", "save_steps": 2})
    done = peftchat("train", str(tmp_path / "run.yaml"), "--resume", "--set", "adapter.r=4")
    assert done.returncode == 2
    assert "adapter.r" in done.stderr
    assert "Traceback" not in done.stderr
    assert run.is_dir()
