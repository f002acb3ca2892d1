"""Processes of a comparison: what is noted of them, and how a failure is told."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from peftchat.comparing.run_processes import RunProcesses, _noted


def test_a_process_that_has_ended_already_leaves_no_note(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    with _noted(ended.pid, tmp_path / "pid"):
        assert not (tmp_path / "pid").exists()


def test_a_failure_ends_the_process_that_is_noted(tmp_path: Path) -> None:
    started = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    with pytest.raises(KeyboardInterrupt), _noted(started.pid, tmp_path / "pid"):
        assert (tmp_path / "pid").read_text() == f"{started.pid} {psutil.Process(started.pid).create_time()}"
        raise KeyboardInterrupt
    assert not psutil.pid_exists(started.pid) and not (tmp_path / "pid").exists()


def test_a_run_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("print('Error: no data'); print('more'); raise SystemExit(2)")
    with pytest.MonkeyPatch.context() as patch, RunProcesses(fork=False) as processes:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert processes.run(["failing"], tmp_path / "log", lambda: None) == "no data"
    assert not (tmp_path / "log.pid").exists() and "more" in (tmp_path / "log").read_text()
