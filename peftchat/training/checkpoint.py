"""Checkpoints that are whole: a marker written last says so, and resuming trusts nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

from peftchat.errors import VerificationError
from peftchat.files import write_text

MARKER = "complete.json"


def mark_complete(checkpoint: Path, totals: list[dict[str, Any]]) -> None:
    """Check a checkpoint's files and write its marker.

    Args:
        checkpoint: the folder, all its files written.
        totals: the counts of each process up to here.

    Raises:
        CheckFailed: a file is empty.
    """
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    empty = [name for name, size in sizes.items() if size == 0]
    if empty:
        raise VerificationError(f"{checkpoint}: the checkpoint's file {empty[0]} is empty")
    write_text(checkpoint / MARKER, json.dumps({"files": sizes, "totals": totals}, indent=1))


def latest_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoints` folder, or None."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((checkpoint for checkpoint in found if _is_complete(checkpoint)), None)


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete checkpoints that a killed run left half-written; returns what was deleted."""
    broken = [checkpoint for checkpoint in folder.glob("checkpoint-*") if not _is_complete(checkpoint)]
    for checkpoint in broken:
        shutil.rmtree(checkpoint)
    return broken


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def totals_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The counts of each process at a checkpoint."""
    totals: list[dict[str, Any]] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["totals"]
    return totals


def _is_complete(checkpoint: Path) -> bool:
    marker = checkpoint / MARKER
    if not marker.is_file():
        return False
    sizes = json.loads(marker.read_text(encoding="utf-8"))["files"]
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )
