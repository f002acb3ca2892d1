"""Checkpoints of a run: which folders are checkpoints, which of them are complete, and which are kept.

A folder counts only if a run wrote it. Copies, links and other files beside the checkpoints are neither read nor
deleted.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.errors import VerificationError
from peftchat.files import appears, write_text
from peftchat.hashing import damage_digest

_MARKER = "complete.json"
_BEGUN = "saving.json"
_TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of a run.

    It counts as complete once its marker file, which is written last, lists the size and a digest of every other file.

    Attributes:
        path: its folder, named by transformers.
    """

    path: Path

    @classmethod
    def at_step(cls, checkpoints: Path, step: int) -> "Checkpoint":
        """Return the checkpoint after a step, complete or not, in a folder of checkpoints."""
        return cls(checkpoints / f"checkpoint-{step}")

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.path.name.rpartition("-")[2])

    @property
    def is_ours(self) -> bool:
        """Whether a run wrote this folder under this name: a copy holds the state of another step."""
        if self.path.is_symlink() or not self.path.is_dir() or not _NAME.fullmatch(self.path.name):
            return False
        begun = _read_object(self.path / _BEGUN)
        if begun is not None:
            return begun.get("step") == self.step
        # The trainer's own state knows the step of checkpoints of every version.
        state = _read_object(self.path / _TRAINER_STATE) or _marker(self.path) or {}
        return (self.path / _MARKER).exists() and state.get("global_step", state.get("step")) == self.step

    @property
    def is_complete(self) -> bool:
        """Whether every file listed in the marker exists and has its size."""
        if (self.path / _BEGUN).exists() or not self.is_ours:
            return False
        return _marker(self.path) is not None and self._wrong_size() is None

    def damage(self) -> str | None:
        """Return what is wrong with a checkpoint that was complete once; None for a good one, and for any other.

        Every file is read (`damage_digest`). Checkpoints of older versions have sizes alone.
        """
        marker = _marker(self.path)
        if marker is None or (self.path / _BEGUN).exists() or not self.is_ours:
            return None
        wrong = self._wrong_size()
        if wrong is not None:
            return wrong
        for name, expected in (marker.get("digests") or {}).items():
            try:
                if damage_digest(self.path / str(name)) != expected:
                    return f"{name} holds other bytes than were written"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
        return None

    def _wrong_size(self) -> str | None:
        for name, size in (_marker(self.path) or {"files": {}})["files"].items():
            file = self.path / str(name)
            if not file.is_file():
                return f"{name} is missing"
            if (found := file.stat().st_size) != size:
                return f"{name} has {found} bytes, expected {size}"
        return None

    def move_aside(self, ending: str) -> None:
        """Rename the folder, so that no run reads it and nothing is lost."""
        aside = self.path.with_name(f"{self.path.name}.{ending}")
        number = 1
        while aside.exists() or aside.is_symlink():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.{ending}{number}")
        self.path.rename(aside)

    def begin(self) -> None:
        """Prepare the folder to be written: an unfinished one is emptied, and what is not ours is moved aside."""
        if self.is_ours:
            self.delete()
        elif self.path.is_symlink() or (self.path.exists() and not _is_empty(self.path)):
            self.move_aside("other")
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / _BEGUN, json.dumps({"step": self.step}))

    def mark_complete(
        self, token_counts: list[dict[str, Any]], record: Mapping[str, Any], *, written: Iterable[str] = ()
    ) -> None:
        """Check the checkpoint's files and write its marker.

        Args:
            token_counts: the counts of each process up to this step, by rank.
            record: what else the marker holds: how and on what the run trains.
            written: the files that the processes see in it, each by its own file system (`names`).

        Raises:
            VerificationError: a file is empty, or another process sees one that is not here.
        """
        for name in sorted(set(written)):
            if not appears(self.path / name):
                raise VerificationError(
                    f"{self.path}: the checkpoint lacks {name}, which another process has written. The processes do "
                    "not see the same run folder: set output_dir to a folder that all machines mount"
                )
        sizes = {str(file.relative_to(self.path)): file.stat().st_size for file in self._files()}
        empty = [name for name, size in sizes.items() if size == 0]
        if empty:
            raise VerificationError(f"{self.path}: the checkpoint's file {empty[0]} is empty")
        digests = {name: damage_digest(self.path / name) for name in sizes}
        content = {"step": self.step, "files": sizes, "digests": digests, "totals": token_counts, **record}
        write_text(self.path / _MARKER, json.dumps(content, indent=1))
        (self.path / _BEGUN).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of the files that training wrote, as this machine sees them."""
        return [str(file.relative_to(self.path)) for file in self._files()]

    def token_counts(self) -> list[dict[str, Any]]:
        """Return the counts of each process at this checkpoint, by rank."""
        counts: list[dict[str, Any]] = (_marker(self.path) or {})["totals"]
        return counts

    def record(self) -> dict[str, Any]:
        """Return what the marker holds beside files and counts; checkpoints of older versions hold nothing."""
        return _marker(self.path) or {}

    def delete(self) -> None:
        """Delete the checkpoint; first the marker, so that half of it is never taken for a whole."""
        with suppress(OSError):  # A full disk is often why it is deleted.
            write_text(self.path / _BEGUN, json.dumps({"step": self.step}))
        (self.path / _MARKER).unlink(missing_ok=True)
        # Network file systems keep files that another process has open, and the folder with them.
        shutil.rmtree(self.path, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Return the files that training wrote, without hidden ones of desktops, notebooks and file systems."""
        files = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
        named = [file for file in files if file.name not in (_MARKER, _BEGUN)]
        return [file for file in named if not any(part.startswith(".") for part in file.relative_to(self.path).parts)]


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints in a folder that a run wrote, complete or not, oldest first."""
    found = [Checkpoint(path) for path in folder.glob("checkpoint-*")]
    return sorted((one for one in found if one.is_ours), key=lambda one: one.step)


def keep_newest(folder: Path, count: int | None, *, best_step: int | None = None) -> None:
    """Delete complete checkpoints except for the newest ones, and that of the best step; None keeps all.

    transformers does this before a new checkpoint is complete, and takes every folder whose name begins like that of a
    checkpoint for one: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/trainer_utils.py
    """
    if count is None or count < 1:
        return
    complete = [checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.is_complete]
    for checkpoint in complete[:-count]:
        if checkpoint.step != best_step:
            checkpoint.delete()


def _marker(folder: Path) -> dict[str, Any] | None:
    marker = _read_object(folder / _MARKER)
    if marker is None or not isinstance(marker.get("files"), dict) or not isinstance(marker.get("totals"), list):
        return None
    return marker if all(isinstance(one, dict) for one in marker["totals"]) else None


def _read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
