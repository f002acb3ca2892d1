"""A run folder belongs to one run, and every state that an interrupted run leaves can be resumed."""

import shutil
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from peftchat.runs.claim import claimed
from tests.support.cli import start
from tests.support.data import read_json, read_json_lines
from tests.support.faults import Fault, Scene, anything, resume, train

ONE_RUN = "One run, one folder"

_SAVING = {"save_strategy": "steps", "save_steps": 2}


def interrupt(scene: Scene, file: str, number: int) -> None:
    """Send a signal to a run as soon as it has written a file."""
    process = start("-m", "peftchat", *train(scene), cwd=scene.folder, environment=scene.environment)
    end = time.monotonic() + 120
    while not (scene.run / file).exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(number)
    process.wait(60)
    assert not (scene.run / "run.json").exists()


def another_run(scene: Scene) -> None:
    """Claim the folder in this process, which lives while the command runs."""
    stack = ExitStack()
    stack.enter_context(claimed(scene.run, option="output_dir"))
    # The variable tells processes that this one starts that the folder is theirs.
    scene.environment["PEFTCHAT_CLAIM"] = ""
    scene.notes["claim"] = stack


def nothing_but_the_claim(scene: Scene) -> None:
    """Check that the refused run touched nothing."""
    assert [path.name for path in scene.run.iterdir()] == [".claim"]
    scene.notes["claim"].close()
    assert not scene.run.exists()


def killed_before_it_began(scene: Scene) -> None:
    """End a run without warning right after it has claimed the folder."""
    interrupt(scene, ".claim", signal.SIGKILL)
    assert (scene.run / ".claim").exists()


def interrupted_before_a_checkpoint(scene: Scene) -> None:
    """Press Ctrl-C right after the run has begun."""
    scene.sections = {"training": {"max_steps": 2000, "save_strategy": "steps", "save_steps": 1000}}
    interrupt(scene, "recipe.yaml", signal.SIGINT)
    scene.sections = {"training": {"max_steps": 4, **_SAVING}}


def killed_while_a_checkpoint_is_written(scene: Scene) -> None:
    """End a run without warning while its second checkpoint is written; only one is kept."""
    scene.sections = {"training": {"max_steps": 2000, "save_total_limit": 1, "save_strategy": "steps", "save_steps": 1}}
    interrupt(scene, "checkpoints/checkpoint-2/saving.json", signal.SIGKILL)
    scene.sections["training"] = {**scene.sections["training"], "max_steps": 8}


def damaged_checkpoint(scene: Scene) -> None:
    """Fill a file of the newest checkpoint with zeros, as a machine does that lost its power."""
    scene.sections = {"training": dict(_SAVING)}
    scene.train()
    file = scene.run / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(bytes(file.stat().st_size))
    scene.sections["training"] = {**_SAVING, "max_steps": 8, "save_total_limit": 9}


def damage_set_aside(scene: Scene) -> None:
    """Check that the run went on from the checkpoint before, and kept the damaged one."""
    trained_steps(scene, 8)
    left = {path.name for path in (scene.run / "checkpoints").iterdir()}
    assert left == {"checkpoint-4.damaged", *(f"checkpoint-{step}" for step in (2, 4, 6, 8))}


def copies_beside_checkpoints(scene: Scene) -> None:
    """Put beside the checkpoints what people and programs put there."""
    scene.sections = {"training": {**_SAVING, "save_total_limit": 1}}
    scene.train()
    checkpoints = scene.run / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-4.old")
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-12")
    (checkpoints / "checkpoint-last").symlink_to("checkpoint-4")
    (checkpoints / ".ipynb_checkpoints").mkdir()
    (checkpoints / "checkpoint-abc").write_text("notes")
    (checkpoints / "checkpoint-6").write_text("in the way")
    scene.sections["training"] = {**scene.sections["training"], "max_steps": 8}


def only_ours_rotated(scene: Scene) -> None:
    """Check that the run kept one checkpoint of its own, and everything of the user's."""
    trained_steps(scene, 8)
    assert {path.name for path in (scene.run / "checkpoints").iterdir()} == {
        "checkpoint-8", "checkpoint-4.old", "checkpoint-12", "checkpoint-last", ".ipynb_checkpoints", "checkpoint-abc",
        "checkpoint-6.other",
    }  # fmt: skip


def trained_steps(scene: Scene, count: int) -> None:
    """Check that the run is finished, and every step was logged once."""
    assert read_json(scene.run / "run.json")["steps"] == count
    lines = read_json_lines(scene.run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, count + 1))
    assert not list(scene.run.glob(".claim*"))


def trained_four(scene: Scene) -> None:
    """Check a run of four steps."""
    trained_steps(scene, 4)


def trained_eight(scene: Scene) -> None:
    """Check a run of eight steps."""
    trained_steps(scene, 8)


def folder_in_a_file(scene: Scene) -> Sequence[object]:
    """Train into a folder whose parent is a file."""
    (scene.folder / "file").write_text("")
    return ("train", scene.recipe, "--set", f"output_dir={scene.folder / 'file' / 'run'}")


FAULTS = (
    Fault(
        "another run is writing to the folder", ONE_RUN, another_run, status=2, after=nothing_but_the_claim,
        says=("another run is writing to this folder", f"on {socket.gethostname()}", "output_dir"),
    ),
    Fault("killed right after the claim", ONE_RUN, killed_before_it_began, status=0, after=trained_four),
    Fault("interrupted before a checkpoint", ONE_RUN, interrupted_before_a_checkpoint, status=0, command=resume,
          after=trained_four),
    Fault("killed while a checkpoint is written", ONE_RUN, killed_while_a_checkpoint_is_written, status=0,
          command=resume, after=trained_eight),
    Fault("a checkpoint filled with zeros", ONE_RUN, damaged_checkpoint, status=0, command=resume,
          after=damage_set_aside, says=(
              "The checkpoint of step 4 is damaged (optimizer.pt holds other bytes than were written)",
              "The run goes on from step 2",
          )),
    Fault("copies and links beside the checkpoints", ONE_RUN, copies_beside_checkpoints, status=0, command=resume,
          after=only_ours_rotated),
    Fault("a file in the way of the folder", ONE_RUN, anything, command=folder_in_a_file, says=("output_dir",)),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_run_folder_belongs_to_one_run(fault: Fault, tmp_path: Path) -> None:
    fault.check(tmp_path)


def test_a_resumed_run_keeps_the_rate_that_auto_gave_it(tmp_path: Path) -> None:
    """The rule knows the number of steps, so that it gives another rate to a run that goes on for more of them."""
    scene = Scene.build(tmp_path)
    scene.sections = {"training": {"learning_rate": "auto", "lr_scheduler_type": "constant", "max_steps": 2, **_SAVING}}
    scene.train()
    scene.sections["training"]["max_steps"] = 4
    scene.train("--resume")
    rates = {line["learning_rate"] for line in read_json_lines(scene.run / "metrics.jsonl") if "learning_rate" in line}
    assert len(rates) == 1 and read_json(scene.run / "run.json")["steps"] == 4


def test_a_resume_that_trains_nothing_says_so(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    scene.sections = {"training": {"max_steps": 4, **_SAVING}}
    scene.train()
    assert "Nothing was trained: the run has made its 4 steps already." in scene.train("--resume").stderr
    fewer = scene.train("--resume", "--set", "training.max_steps=3").stderr
    assert "4 steps already, more than training.max_steps: 3" in fewer
    spent = scene.train("--resume", "--set", "training.max_train_tokens=10")
    assert "Nothing was trained" in spent.stderr


def test_a_moved_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    scene.sections = {"training": {"max_steps": 2, **_SAVING}}
    scene.train()
    moved = scene.run.rename(tmp_path / "moved")
    more = ("--resume", "--set", "training.max_steps=4")
    refused = scene.peftchat("train", moved / "recipe.yaml", *more)
    assert refused.returncode == 2 and f"Add `--set output_dir={moved}`" in refused.stderr
    assert not scene.run.exists()
    done = scene.peftchat("train", moved / "recipe.yaml", *more, "--set", f"output_dir={moved}")
    assert done.returncode == 0 and read_json(moved / "run.json")["steps"] == 4


def test_a_changed_setting_is_shown_as_the_recipe_writes_it(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    scene.sections = {"training": {"max_steps": 2, **_SAVING}}
    scene.train()
    for change, said in {
        "data.packing=false": "data.packing: true, and is resumed with false",
        "data.max_train_samples=3": "data.max_train_samples: null, and is resumed with 3",
        "data.train.0.weight=2": 'data.train: [{"weight": 1.0}], and is resumed with [{"weight": 2.0}]',
        "objective=dpo": "objective: sft, and is resumed with dpo",
    }.items():
        refused = scene.peftchat("train", scene.recipe, "--resume", "--set", change)
        assert refused.returncode == 2 and said in " ".join(refused.stderr.split()), refused.stderr
