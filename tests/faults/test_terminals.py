"""Terminals, pipes and devices that standard output leads to."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.cli import COMMAND, true_peftchat
from tests.support.faults import Scene

_FULL = "Error: standard output cannot be written: No space left on device.\n"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `$P` is the command; the status is the command's, whatever stands behind a pipe."""
    text = line.replace("$P", " ".join(COMMAND)) + "; exit ${PIPESTATUS[0]}"
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("$P variants --json | true", 141, ""),
        ("$P variants | true", 141, ""),
        ("$P variants > /dev/full", 2, _FULL),
        ("$P variants --json > /dev/full", 2, _FULL),
        ("$P --help > /dev/full", 2, _FULL),
        ("$P variants >&-", 0, ""),
        ("$P variants no-such 2>&-", 2, ""),
        ("$P variants no-such 2>/dev/full", 2, ""),
    ],
)
def test_a_stream_that_ends_early(line: str, status: int, says: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stderr) == (status, says)


@pytest.mark.parametrize("columns", ["0", "1", "20", "wide", "-3"])
def test_a_narrow_terminal(columns: str) -> None:
    done = true_peftchat("variants", COLUMNS=columns, TERM="dumb", NO_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    done = shell(f"export PYTHONPATH={Path.cwd()}; mkdir {gone}; cd {gone}; rmdir {gone}; $P variants")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: the working folder no longer exists")


def test_text_that_the_terminal_has_no_bytes_for(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    lines = [
        {"messages": [{"role": "user", "content": f"Grüße {n} …"}, {"role": "assistant", "content": "“日本” — 😀"}]}
        for n in range(3)
    ]
    scene.data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    done = true_peftchat("mask", scene.recipe, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Gr??e 0 ?" in done.stdout.replace("·", "")
