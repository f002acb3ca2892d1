"""Faults that are injected on purpose, and what a user has to see of each.

A table in `tests/faults` is a list of `Fault`; one more line is one more fault that is tried.
"""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cli import peftchat
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


@dataclass
class Scene:
    """A small run that works, to be damaged.

    Attributes:
        folder: everything is in here; also the working directory of the command.
        base: a base model of the scene's own.
        data: a file of conversations.
        run: the run folder, which does not exist yet.
        sections: sections of the recipe, merged over a LoRA recipe of four steps.
        environment: variables of the command.
        notes: what `inject` leaves for `after`.
    """

    folder: Path
    base: Path
    data: Path
    run: Path
    sections: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, folder: Path) -> "Scene":
        """Put a random Llama and six conversations into a folder."""
        base = shutil.copytree(small_model(), folder / "base")
        return cls(folder, base, write_small_talk(folder / "train.jsonl", 6), folder / "run")

    @property
    def recipe(self) -> Path:
        """The recipe, written at every call."""
        return write_training_recipe(self.folder / "recipe.yaml", self.base, self.data, None, self.run, **self.sections)

    def peftchat(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the scene's folder and environment."""
        return peftchat(*arguments, cwd=self.folder, **{**self.environment, **environment})

    def train(self, *flags: object) -> subprocess.CompletedProcess[str]:
        """Train by the recipe, and check that it works."""
        done = self.peftchat("train", self.recipe, *flags)
        assert done.returncode == 0, done.stderr
        return done


def train(scene: Scene) -> Sequence[object]:
    """Return the arguments of `train`."""
    return ("train", scene.recipe)


def resume(scene: Scene) -> Sequence[object]:
    """Return the arguments of `train --resume`."""
    return ("train", scene.recipe, "--resume")


def merge(scene: Scene) -> Sequence[object]:
    """Return the arguments of `merge`."""
    return ("merge", scene.run)


def nothing_written(scene: Scene) -> None:
    """Check that the command left no run folder."""
    assert not scene.run.exists(), sorted(scene.run.rglob("*"))


def no_model(scene: Scene) -> None:
    """Check that nothing in the run folder looks like a finished run."""
    left = {path.name for path in scene.run.glob("*")}
    assert not left & {"run.json", "adapter_config.json", "adapter_model.safetensors", "config.json"}, left
    assert not list(scene.run.glob("model*.safetensors"))


def anything(scene: Scene) -> None:
    """Check nothing."""


@dataclass(frozen=True)
class Fault:
    """A fault and what becomes of it.

    Attributes:
        name: what is wrong, in a few words; the test's name.
        promise: the heading in `docs/guarantees.md` that it is an instance of.
        inject: damages the scene.
        says: texts that standard error has to contain, all of them.
        status: the exit status.
        command: the arguments of the command.
        after: checks what is left on disk.
    """

    name: str
    promise: str
    inject: Callable[[Scene], Any]
    says: tuple[str, ...] = ()
    status: int = 2
    command: Callable[[Scene], Sequence[object]] = train
    after: Callable[[Scene], None] = nothing_written

    def check(self, folder: Path) -> None:
        """Inject the fault, run the command, and compare."""
        scene = Scene.build(folder)
        self.inject(scene)
        done = scene.peftchat(*self.command(scene))
        assert done.returncode == self.status, done.stderr
        assert "Traceback" not in done.stderr
        said = " ".join(done.stderr.split())
        for text in self.says:
            assert text in said
        if self.status == 2:
            assert done.stderr.count("Error:") == 1
            assert not done.stdout
        self.after(scene)
