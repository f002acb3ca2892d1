"""Outputs that would destroy something of the user's: refused whatever the flags, before any work."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.faults import Fault, Scene

PROMISE = "Nothing of the user's is destroyed"


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def note_contents(scene: Scene) -> None:
    """Remember what is there before the command."""
    scene.notes["before"] = contents(scene.folder)


def nothing_changed(scene: Scene) -> None:
    """Check that every file is there as before, and no other."""
    left = {name: digest for name, digest in contents(scene.folder).items() if name != "recipe.yaml"}
    assert left == {name: digest for name, digest in scene.notes["before"].items() if name != "recipe.yaml"}


def output(place: str, name: str, says: str, link: str | None = None) -> Fault:
    """Return a fault of `train`: an output folder that is something else."""

    def inject(scene: Scene) -> None:
        if link is not None:
            (scene.folder / place).symlink_to(scene.folder / link)
        note_contents(scene)

    def command(scene: Scene) -> Sequence[object]:
        return ("train", scene.recipe, "--set", f"output_dir={place}")

    return Fault(f"train: {name}", PROMISE, inject, (says,), command=command, after=nothing_changed)


def other(name: str, arguments: Sequence[str], says: str, files: Sequence[str] = ()) -> Fault:
    """Return a fault of another command, with files of the user's in its way."""

    def inject(scene: Scene) -> None:
        scene.sections["data"] = {"eval_fraction": 0.5}
        _ = scene.recipe
        for file in files:
            (scene.folder / file).parent.mkdir(exist_ok=True)
            (scene.folder / file).write_text("precious")
        note_contents(scene)

    return Fault(name, PROMISE, inject, (says,), command=lambda scene: arguments, after=nothing_changed)


FAULTS = (
    output("base", "the base model", "is the base model"),
    output(".", "the working folder", "is the working folder"),
    output("alias", "a link to the base model", "is the base model", link="base"),
    other("mask: the data", ("mask", "recipe.yaml", "--html", "train.jsonl"), "is the data"),
    other("mask: the recipe", ("mask", "recipe.yaml", "--html", "./recipe.yaml"), "is the recipe"),
    other("mask: the null device", ("mask", "recipe.yaml", "--html", "/dev/null"), "a device"),
    other(
        "mask: a page of another tool", ("mask", "recipe.yaml", "--html", "my.html"), "not an HTML page", ["my.html"]
    ),
    other("stats: the data", ("data", "stats", "train.jsonl", "--html", "base/../train.jsonl"), "is the data"),
    other("prepare: below its source", ("data", "prepare", ".", "-o", "out"), "lies in the source"),
    other("from-code: other data", ("data", "from-code", "json", "-o", "mine"), "did not write", ["mine/train.jsonl"]),
    other("init: an existing file", ("init", "-o", "train.jsonl"), "already exists"),
    other("compare: the base", ("compare", "recipe.yaml", "--variants", "lora", "-o", "base"), "is the base model"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_output(fault: Fault, tmp_path: Path) -> None:
    fault.check(tmp_path)


def test_merge_and_export_replace_their_own_outputs_alone(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    scene.train("--set", "training.max_steps=2")
    for name in ("theirs", "taken.partial", "run/merged.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("precious")
    os.link(scene.base / "model.safetensors", tmp_path / "twin.gguf")
    note_contents(scene)
    refused = {
        ("merge", "run", "-o", "base"): "is the base model",
        ("merge", "run", "-o", "run"): "is the run",
        ("merge", "run", "-o", "run/"): "is the run",
        ("merge", "run", "-o", "."): "is the working folder",
        ("merge", "run", "-o", "run/checkpoints"): "is a checkpoint",
        ("merge", "run", "-o", "theirs"): "never replaced",
        ("merge", "run", "-o", "train.jsonl"): "is the data",
        ("merge", "run", "-o", "taken"): "holds something else",
        ("merge", "run", "-o", "a" * 300): "300 bytes",
        ("export", "run", "--to", "gguf", "-o", "run/adapter_model.safetensors"): "a file of the model",
        ("export", "run", "--to", "gguf", "-o", "twin.gguf"): "not a GGUF file",
        ("export", "run", "--to", "gguf", "-o", "theirs"): "is a folder",
        ("export", "run", "--to", "ollama", "-o", "run"): "is the model",
    }
    for arguments, says in refused.items():
        done = scene.peftchat(*arguments, "--overwrite")
        assert (done.returncode, done.stdout) == (2, ""), (arguments, done.stderr)
        assert says in " ".join(done.stderr.split()), (arguments, done.stderr)
        assert done.stderr.count("Error:") == 1
        nothing_changed(scene)
    for _ in range(2):
        done = scene.peftchat("merge", "run", "--overwrite")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "merged.old" / "model.safetensors").read_text() == "precious"
    (tmp_path / "run" / "merged" / "notes.txt").write_text("precious")
    done = scene.peftchat("merge", "run", "--overwrite")
    assert (done.returncode, "`notes.txt`" in done.stderr) == (2, True)
