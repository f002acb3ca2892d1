"""A run goes on with what it began with, and so does everything that reads it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.data import read_json
from tests.support.faults import Fault, Scene, anything, merge, resume

GOES_ON = "A run goes on with what it began with"


def trained(scene: Scene) -> None:
    """Train four steps, to be resumed for eight."""
    scene.sections = {"training": {"save_strategy": "steps", "save_steps": 2}}
    scene.train()
    scene.sections["training"] = {**scene.sections["training"], "max_steps": 8}


def other_rows(scene: Scene) -> None:
    """Change a conversation behind the same path."""
    trained(scene)
    lines = scene.data.read_text().splitlines()
    row = json.loads(lines[2])
    row["messages"][-1]["content"] += " indeed"
    scene.data.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n")


def other_base(scene: Scene) -> None:
    """Change one number of the base."""
    trained(scene)
    weights = load_file(scene.base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, scene.base / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(scene: Scene) -> None:
    """Exchange two tokens of the base's tokenizer."""
    trained(scene)
    file = scene.base / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


def other_template(scene: Scene) -> None:
    """Edit the template that the run saved."""
    trained(scene)
    file = scene.run / "chat_template.jinja"
    file.write_text(file.read_text() + "\n")


def moved(scene: Scene) -> None:
    """Move the base and the data."""
    trained(scene)
    scene.base.rename(scene.folder / "base2")
    scene.data.rename(scene.folder / "moved.jsonl")


def resume_moved(scene: Scene) -> Sequence[object]:
    """Resume with the new places."""
    scene.base, scene.data = scene.folder / "base2", scene.folder / "moved.jsonl"
    return resume(scene)


def resume_allowed(scene: Scene) -> Sequence[object]:
    """Resume and allow the change."""
    return (*resume(scene), "--allow-changed")


def merge_moved(scene: Scene) -> Sequence[object]:
    """Merge with the base's new place."""
    return (*merge(scene), "--base", scene.folder / "base2")


def merge_allowed(scene: Scene) -> Sequence[object]:
    """Merge and allow the change."""
    return (*merge(scene), "--allow-changed")


def chat(scene: Scene) -> Sequence[object]:
    """Ask one question."""
    return ("chat", scene.run, "--prompt", "hello", "--max-new-tokens", "1")


def without_record(scene: Scene) -> None:
    """Take away what older versions did not write."""
    other_rows(scene)
    (scene.run / "fingerprints.json").unlink()
    (scene.run / "data_digests.npz").unlink()
    for file in (scene.run / "run.json", *scene.run.rglob("complete.json")):
        content = read_json(file)
        for key in ("fingerprints", "allowed_changes", "layout", "step"):
            content.pop(key, None)
        file.write_text(json.dumps(content))


def recorded(scene: Scene) -> None:
    """Check that the run has the change on record."""
    summary = read_json(scene.run / "run.json")
    assert summary["steps"] == 8
    assert "train data: 1 of 6" in summary["allowed_changes"][0]


def recorded_merge(scene: Scene) -> None:
    """Check that the merge has the change on record."""
    assert "model.safetensors" in read_json(scene.run / "merged" / "merge_report.json")["allowed_changes"][0]


def untouched(scene: Scene) -> None:
    """Check that the refused command left the finished run as it was."""
    assert read_json(scene.run / "run.json")["steps"] == 4
    assert not (scene.run / "merged").exists()
    assert not list(scene.run.glob(".claim*"))


FAULTS = (
    Fault("other rows behind the path", GOES_ON, other_rows, command=resume, after=untouched,
          says=("train data: 1 of 6 conversations are new or changed", "train.jsonl:3", "--allow-changed")),
    Fault("other rows, allowed", GOES_ON, other_rows, command=resume_allowed, status=0, after=recorded),
    Fault("another base in its place", GOES_ON, other_base, command=resume, after=untouched,
          says=("base: model.safetensors differs",)),
    Fault("another tokenizer in its place", GOES_ON, other_tokenizer, command=resume, after=untouched,
          says=("tokenizer: it encodes text in another way",)),
    Fault("another base under a merge", GOES_ON, other_base, command=merge, after=untouched,
          says=("base: model.safetensors differs", "--base")),
    Fault("another base under a merge, allowed", GOES_ON, other_base, command=merge_allowed, status=0,
          after=recorded_merge),
    Fault("a template edited in the run", GOES_ON, other_template, command=chat, after=untouched,
          says=("chat_template.jinja differs",)),
    Fault("a base that has moved", GOES_ON, moved, command=merge, after=untouched,
          says=("is not there", "--base PATH")),
    Fault("a base that has moved, named", GOES_ON, moved, command=merge_moved, status=0, after=anything),
    Fault("base and data that have moved", GOES_ON, moved, command=resume_moved, status=0, after=anything),
    Fault("a run of an older version", GOES_ON, without_record, command=resume, status=0, after=anything),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_run_goes_on_with_what_it_began_with(fault: Fault, tmp_path: Path) -> None:
    fault.check(tmp_path)


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    trained(scene)
    shutil.rmtree(scene.run / "checkpoints")
    for name in ("fingerprints.json", "data_digests.npz"):
        (scene.run / name).write_text("")
    done = scene.peftchat(*chat(scene))
    assert done.returncode == 0, done.stderr
