"""A user's mistake: one clear message, status 2, no traceback, nothing written."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import peftchat
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {"base": small_model(), "data": write_small_talk(tmp_path / "train.jsonl", 6), "run": tmp_path / "run"}


def refused(tmp_path: Path, files: dict[str, Path], *, flags: tuple[str, ...] = (), **sections: Any) -> str:
    """Train and expect a refusal; returns what was said."""
    before = sorted(files["run"].rglob("*")) if files["run"].exists() else None
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", files["base"], files["data"], None, files["run"], **sections
    )
    done = peftchat("train", str(recipe), *flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error:") == 1
    assert not done.stdout
    assert (sorted(files["run"].rglob("*")) if files["run"].exists() else None) == before
    return done.stderr


def test_data(tmp_path: Path, files: dict[str, Path]) -> None:
    files["data"] = tmp_path / "nowhere.jsonl"
    assert "nowhere.jsonl" in refused(tmp_path, files)
    files["data"] = tmp_path / "empty.jsonl"
    files["data"].touch()
    assert "empty" in refused(tmp_path, files)
    files["data"] = tmp_path / "folder"
    files["data"].mkdir()
    (files["data"] / "notes.txt").write_text("no conversations here")
    assert "folder" in refused(tmp_path, files)
    files["data"] = tmp_path / "roles.jsonl"
    turns = [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]
    files["data"].write_text(json.dumps({"messages": turns}) + "\n")
    said = refused(tmp_path, files)
    assert "wizard" in said
    assert "roles.jsonl:1" in said


def test_nothing_to_learn(tmp_path: Path, files: dict[str, Path]) -> None:
    turns = [{"role": "user", "content": "the cat " * 80}, {"role": "assistant", "content": "sat"}]
    files["data"].write_text(json.dumps({"messages": turns}) + "\n")
    said = refused(tmp_path, files, data={"max_length": 16})
    assert "max_length" in said


def test_model_folders(tmp_path: Path, files: dict[str, Path]) -> None:
    whole = files["base"]
    files["base"] = tmp_path / "no-weights"
    shutil.copytree(whole, files["base"])
    (files["base"] / "model.safetensors").unlink()
    assert "weights" in refused(tmp_path, files)
    (files["base"] / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pickled" in refused(tmp_path, files)
    (files["base"] / "config.json").unlink()
    assert "config.json" in refused(tmp_path, files)
    files["base"] = tmp_path / "no-tokenizer"
    shutil.copytree(whole, files["base"])
    for file in files["base"].glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(tmp_path, files)


def test_a_tokenizer_without_a_template(tmp_path: Path, files: dict[str, Path]) -> None:
    assert "chat template" in refused(tmp_path, files, chat={"template": "model"})


def test_an_adapter_that_fits_nowhere(tmp_path: Path, files: dict[str, Path]) -> None:
    assert "target_modules" in refused(tmp_path, files, adapter={"target_modules": ["nothing_proj"]})


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_where_the_added_tokens_are(name: str, tmp_path: Path, files: dict[str, Path]) -> None:
    assert "cannot have an adapter" in refused(tmp_path, files, adapter={"target_modules": ["q_proj", name]})


def test_output_folder_of_another_run(tmp_path: Path, files: dict[str, Path]) -> None:
    files["run"].mkdir()
    (files["run"] / "recipe.yaml").write_text("method: full\n")
    assert "another run" in refused(tmp_path, files)
    (files["run"] / "recipe.yaml").rename(files["run"] / "holiday.jpg")
    assert "other files" in refused(tmp_path, files)


def test_more_gpus_than_there_are(tmp_path: Path, files: dict[str, Path]) -> None:
    said = refused(tmp_path, files, distributed={"processes": 4096})
    assert "4096" in said
    assert "distributed.processes" in said


def test_an_unknown_tracker(tmp_path: Path, files: dict[str, Path]) -> None:
    said = refused(tmp_path, files, training={"report_to": "tensorbord"})
    assert "tensorboard" in said


def test_special_text_where_it_is_forbidden(tmp_path: Path, files: dict[str, Path]) -> None:
    turns = [{"role": "user", "content": "say <|end|>"}, {"role": "assistant", "content": "no"}]
    files["data"].write_text(json.dumps({"messages": turns}) + "\n")
    assert "special token" in refused(tmp_path, files, chat={"special_token_text": "error"})


def test_dry_run_writes_nothing(tmp_path: Path, files: dict[str, Path]) -> None:
    recipe = write_training_recipe(tmp_path / "recipe.yaml", files["base"], files["data"], None, files["run"])
    done = peftchat("train", str(recipe), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "<|assistant|>" in done.stdout
    assert "steps" in done.stdout
    assert not files["run"].exists()


def test_no_space_left(tmp_path: Path, files: dict[str, Path]) -> None:
    """A disk that the run would fill is refused before the first step."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted without more rights")
    try:
        files["run"] = disk / "run"
        assert "of disk space" in refused(tmp_path, files)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_only_a_gpu_can_do(tmp_path: Path, files: dict[str, Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "float16" in refused(tmp_path, files, model={"dtype": "float16"})
    assert "paged_adamw_8bit" in refused(tmp_path, files, training={"optim": "paged_adamw_8bit"})


def test_a_finished_run_without_checkpoints_is_not_trained_again(tmp_path: Path, files: dict[str, Path]) -> None:
    recipe = write_training_recipe(tmp_path / "recipe.yaml", files["base"], files["data"], None, files["run"])
    assert peftchat("train", str(recipe)).returncode == 0
    before = (files["run"] / "run.json").read_bytes()
    assert "finished" in refused(tmp_path, files, flags=("--resume",))
    assert (files["run"] / "run.json").read_bytes() == before
