"""Checkpoints: only what a run wrote under that name is read or deleted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.runs.checkpoint import Checkpoint, keep_newest, list_checkpoints
from peftchat.runs.run_folder import RunFolder
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


def write_checkpoint(folder: Path, step: int, *, complete: bool = True) -> Checkpoint:
    """Write what the trainer writes, with a network file system's and a desktop's files beside it."""
    checkpoint = Checkpoint.at_step(folder, step)
    checkpoint.begin()
    (checkpoint.path / "optimizer.pt").write_bytes(b"state")
    (checkpoint.path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (checkpoint.path / ".nfs0000a1").write_bytes(b"open elsewhere")
    (checkpoint.path / ".DS_Store").write_bytes(b"")
    if complete:
        checkpoint.mark_complete([{"tokens": 1}], {})
    return checkpoint


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def copy(folder: Path, name: str) -> None:
    shutil.copytree(folder / "checkpoint-2", folder / name)


OTHERS: dict[str, Callable[[Path], object]] = {
    "a copy with another ending": lambda folder: copy(folder, "checkpoint-2.old"),
    "a copy under another step": lambda folder: copy(folder, "checkpoint-7"),
    "a step with zeros": lambda folder: copy(folder, "checkpoint-02"),
    "a link without a step": lambda folder: (folder / "checkpoint-last").symlink_to("checkpoint-2"),
    "a link with a step": lambda folder: (folder / "checkpoint-9").symlink_to("checkpoint-2"),
    "a dangling link": lambda folder: (folder / "checkpoint-8").symlink_to("gone"),
    "a word": lambda folder: (folder / "checkpoint-abc").mkdir(),
    "a notebook's copies": lambda folder: (folder / ".ipynb_checkpoints").mkdir(),
    "a file": lambda folder: (folder / "checkpoint-3").write_text("notes"),
    "a folder of the user's": lambda folder: (folder / "checkpoint-5").mkdir(),
    "a desktop's file": lambda folder: (folder / ".DS_Store").write_bytes(b""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_run_did_not_write_is_neither_read_nor_deleted(name: str, tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    before = set(tmp_path.iterdir())
    OTHERS[name](tmp_path)
    (other,) = set(tmp_path.iterdir()) - before
    assert steps(tmp_path) == [1, 2]
    keep_newest(tmp_path, 1)
    assert steps(tmp_path) == [2]
    assert other.exists() or other.is_symlink()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": []}', '{"files": {}, "totals": 3}', "\x00\x00"])
def test_a_checkpoint_with_a_damaged_marker_is_incomplete(content: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    newest = write_checkpoint(tmp_path, 4)
    (newest.path / "complete.json").write_text(content)
    assert not newest.is_complete
    assert newest.is_ours


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "optimizer.pt is missing"),
        (b"sta", "optimizer.pt has 3 bytes, expected 5"),
        (bytes(5), "optimizer.pt holds other bytes than were written"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    content: bytes | None, wrong: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    older, newer = (write_checkpoint(folder.checkpoints, step) for step in (2, 4))
    (newer.path / "optimizer.pt").unlink()
    if content is not None:
        (newer.path / "optimizer.pt").write_bytes(content)
    assert folder.resumable_checkpoint() == (older, {4: wrong})
    (older.path / "optimizer.pt").write_bytes(b"other")
    with pytest.raises(UserError, match=f"no checkpoint can be used: {wrong}"):
        folder.resumable_checkpoint()


def test_damage_in_a_large_file_is_seen_in_a_sample(tmp_path: Path) -> None:
    checkpoint = Checkpoint.at_step(tmp_path, 2)
    checkpoint.begin()
    large = checkpoint.path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(70 << 20)
    checkpoint.mark_complete([{"tokens": 1}], {})
    assert checkpoint.damage() is None
    with large.open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"x" * (1 << 20))
    assert checkpoint.damage() == "model.safetensors holds other bytes than were written"


def test_hidden_files_do_not_belong_to_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2)
    (checkpoint.path / ".nfs0000a1").unlink()
    assert checkpoint.is_complete
    (checkpoint.path / "optimizer.pt").write_bytes(b"stat")
    assert not checkpoint.is_complete


def test_what_stands_in_the_way_of_a_checkpoint_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").write_text("notes")
    (tmp_path / "checkpoint-3.other").write_text("older notes")
    write_checkpoint(tmp_path, 3)
    assert steps(tmp_path) == [3]
    assert (tmp_path / "checkpoint-3.other2").read_text() == "notes"
    assert (tmp_path / "checkpoint-3.other").read_text() == "older notes"


def test_files_of_an_unfinished_checkpoint_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, complete=False)
    (tmp_path / "checkpoint-3" / "rng_state_1.pth").write_bytes(b"of a second process")
    write_checkpoint(tmp_path, 3)
    assert not (tmp_path / "checkpoint-3" / "rng_state_1.pth").exists()


def test_a_deletion_that_was_interrupted_leaves_no_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    keep_newest(tmp_path, 1)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path) if checkpoint.is_complete] == [2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two checkpoints and four logged steps."""
    data = write_small_talk(tmp_path / "train.jsonl", 6)
    recipe = write_training_recipe(tmp_path / "recipe.yaml", small_model(), data, None, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.begin(load_recipe(recipe).recipe, None)
    for step in range(1, 5):
        folder.metrics.append({"step": step, "loss": 1.0})
    write_checkpoint(folder.checkpoints, 2)
    write_checkpoint(folder.checkpoints, 4)
    return folder


def resume(run: RunFolder) -> int | None:
    """Return the step that the run would go on from."""
    recipe = load_recipe(run.path.parent / "recipe.yaml").recipe
    checkpoint = run.check_usable(recipe, resume=True)
    run.begin(recipe, checkpoint)
    return checkpoint.step if checkpoint else None


def unfinished(run: RunFolder) -> None:
    write_checkpoint(run.checkpoints, 6, complete=False)


def torn(run: RunFolder) -> None:
    (run.checkpoints / "checkpoint-4" / "optimizer.pt").unlink()


def none(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoints)


def half_published(run: RunFolder) -> None:
    (run.path / ".model.tmp").mkdir()
    (run.path / "adapter_config.json").write_text("{}")


def half_line(run: RunFolder) -> None:
    with run.metrics.path.open("a") as file:
        file.write('{"step": 5, "lo')


@pytest.mark.parametrize(
    ("state", "step"), [(unfinished, 4), (torn, 2), (none, None), (half_published, 4), (half_line, 4)]
)
def test_every_state_that_an_interrupted_run_leaves_can_be_resumed(
    state: Callable[[RunFolder], None], step: int | None, run: RunFolder
) -> None:
    state(run)
    assert resume(run) == step
    assert [line["step"] for line in run.metrics.read()] == list(range(1, (step or 0) + 1))
    assert all(checkpoint.is_complete for checkpoint in list_checkpoints(run.checkpoints))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("recipe.yaml", "", "empty"),
        ("recipe.yaml", "model: {name", "recipe.yaml"),
        ("metrics.jsonl", '{"step": 1}\n\x00\x00\n{"step": 2}\n', "metrics.jsonl:2"),
        ("metrics.jsonl", "3\n", "not a JSON object"),
    ],
)
def test_a_damaged_file_is_told_before_training(file: str, content: str, says: str, run: RunFolder) -> None:
    (run.path / file).write_text(content)
    with pytest.raises(UserError, match=says) as raised:
        resume(run)
    assert raised.value.hint


@pytest.mark.parametrize(
    "left",
    [(), (".claim",), ("checkpoints",), ("checkpoints", "tensorboard"), (".model.tmp",), (".recipe.yaml.7.tmp",)],
)
@pytest.mark.parametrize("resumes", [False, True])
def test_a_folder_in_which_no_run_has_begun_is_free(left: tuple[str, ...], resumes: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).mkdir()
    data = write_small_talk(tmp_path / "train.jsonl", 6)
    recipe = load_recipe(write_training_recipe(tmp_path / "recipe.yaml", small_model(), data, None, run)).recipe
    assert RunFolder(run).check_usable(recipe, resume=resumes) is None
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        RunFolder(run).check_usable(recipe, resume=resumes)
