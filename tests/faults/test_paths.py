"""Paths that no file system takes, or that the shell would have expanded."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from peftchat.recipe import load_recipe
from tests.support.faults import Fault, Scene

PROMISE = "Paths and terminals"


def nothing(scene: Scene) -> None:
    """Damage nothing."""


def no_new_folder(scene: Scene) -> None:
    """Check that the command made no file or folder; the cache may hold examples that were encoded already."""
    assert {path.name for path in scene.folder.iterdir()} <= {"base", "cache", "train.jsonl", "recipe.yaml"}


def value(name: str, setting: str, says: str) -> Fault:
    """Return a fault of a value of the recipe."""

    def command(scene: Scene) -> Sequence[object]:
        return ("train", scene.recipe, "--set", setting)

    return Fault(name, PROMISE, nothing, (says,), command=command, after=no_new_folder)


FAULTS = (
    value("an unset variable", "output_dir=$NO_SUCH/run", "--set output_dir: the environment variable NO_SUCH"),
    value(
        "an unset variable in the data", "data.train.0.path=${NO_SUCH}/a.jsonl", "data.train.0.path: the environment"
    ),
    value("no such user", "output_dir=~no-such-user/run", "there is no user `no-such-user`"),
    value("a name too long", f"output_dir={'a' * 300}", "300 bytes"),
    value("a model's name too long", f"model.name={'a' * 300}", "300 bytes"),
    value("a line break", 'output_dir="a\\nb"', "line break"),
    value("NUL", 'output_dir="a\\0b"', "NUL"),
    value("a trailing blank", 'output_dir="run "', "ends with a blank"),
    value("an empty path", 'output_dir=""', "output_dir"),
    value("a number", "output_dir=2024", "output_dir"),
    value("nothing", "output_dir=null", "output_dir"),
    value("a file in place of a folder", "output_dir=train.jsonl/run", "is a file, not a folder"),
    value("a place that takes no files", "output_dir=/proc/run", "/proc"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_path(fault: Fault, tmp_path: Path) -> None:
    fault.check(tmp_path)


def test_variables_and_the_home_folder_are_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene.build(tmp_path)
    scene.environment |= {"HOME": str(tmp_path), "DATA": "train", "COST": "5"}
    made = scene.peftchat(
        *("train", scene.recipe, "--set", "training.max_steps=1", "--set", "model.name=~/base"),
        *("--set", "data.train.0.path=${DATA}.jsonl", "--set", "output_dir=~/r$$COST"),
    )
    assert made.returncode == 0, made.stderr
    run = tmp_path / "r$COST"
    # The resolved recipe means the same folders, whatever the variables are.
    monkeypatch.setenv("COST", "6")
    assert load_recipe(run / "recipe.yaml").recipe.output_dir == str(run)
    merged = scene.peftchat("merge", run, "-o", "~/merged")
    assert merged.returncode == 0, merged.stderr
    assert (tmp_path / "merged" / "config.json").is_file()
    assert not (tmp_path / "~").exists()
