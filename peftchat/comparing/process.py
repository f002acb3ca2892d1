"""A process of its own for each run: its memory is its own, and so is its end."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from peftchat.files import write_text

_LOOK_EVERY = 0.5
_PATIENCE = 30.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def run_python(arguments: Sequence[str], log: Path, watch: Callable[[], None]) -> str | None:
    """Run `python -m ARGUMENTS` to its end, all that it says going to `log`.

    Args:
        watch: called about twice a second while the process runs.

    Returns:
        None if it ended well, else the reason in one line.
    """
    _end_leftover(log)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    note = _pid_file(log)
    write_text(note, f"{process.pid} {psutil.Process(process.pid).create_time()}")
    try:
        while process.poll() is None:
            watch()
            time.sleep(_LOOK_EVERY)
    finally:
        if process.poll() is None:
            _end(psutil.Process(process.pid))
            process.wait()
        note.unlink(missing_ok=True)
    return None if process.returncode == 0 else _reason(process.returncode, log)


def _pid_file(log: Path) -> Path:
    return log.with_suffix(".pid")


def _end_leftover(log: Path) -> None:
    """End the process of an earlier start that was killed itself: two must not write one run."""
    note = _pid_file(log)
    if not note.is_file():
        return
    pid, _, born = note.read_text(encoding="utf-8").partition(" ")
    with suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid))
        # The number may belong to another process by now.
        if f"{process.create_time()}" == born:
            _end(process)
    note.unlink()


def _end(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        family = [*process.children(recursive=True), process]
        for one in family:
            one.terminate()
        _, alive = psutil.wait_procs(family, timeout=_PATIENCE)
        for one in alive:
            one.kill()


def _reason(status: int, log: Path) -> str:
    if status < 0:
        return f"ended by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    lines = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()
    for line in reversed(lines):
        for mark in ("Error: ", "Failed: "):
            if line.startswith(mark):
                return line.removeprefix(mark)
    # A traceback ends with the exception.
    return next((line.strip() for line in reversed(lines) if line.strip()), f"ended with status {status}")
