"""A claim: one holder, however many start, and a dead one is replaced."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from peftchat.errors import UserError, VerificationError
from peftchat.runs import claim
from peftchat.runs.claim import CLAIM, Holder, claimed, is_claim, refuse_held

HOLD = """
import sys, time
from pathlib import Path
from peftchat.runs.claim import claimed
from peftchat.errors import UserError
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
try:
    with claimed(Path(sys.argv[1]), option="output_dir"):
        print("got it", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


def hold(folder: Path, gate: Path) -> "subprocess.Popen[str]":
    """Start a process that claims a folder once the gate is there, and holds it until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(folder), str(gate)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def write_claim(folder: Path, **changes: object) -> Holder:
    folder.mkdir(parents=True, exist_ok=True)
    holder = replace(Holder.this_process(), **changes)
    (folder / CLAIM).write_text(json.dumps(asdict(holder)))
    return holder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim whose holder is taken for dead after a second."""
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(claim, "SILENCE_SECONDS", 1.0)


@pytest.mark.parametrize("start", ["nothing", "a dead claim"])
def test_of_processes_that_start_at_once_exactly_one_wins(start: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if start == "a dead claim":
        write_claim(folder, pid=2**22 + 1)
    processes = [hold(folder, tmp_path / "gate") for _ in range(4)]
    time.sleep(0.5)
    (tmp_path / "gate").touch()
    try:
        said = [str(process.stdout.readline()) for process in processes if process.stdout]
        winners = [process for process, line in zip(processes, said, strict=True) if line == "got it\n"]
        assert len(winners) == 1, said
        losers = [line for line in said if line != "got it\n"]
        assert all(f"process {winners[0].pid} on {socket.gethostname()}" in line for line in losers), said
    finally:
        for process in processes:
            process.communicate("")
    assert not folder.exists() or not list(folder.iterdir())


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    process = hold(tmp_path / "run", tmp_path / "gate")
    assert process.stdout is not None
    assert process.stdout.readline() == "got it\n"
    with pytest.raises(UserError, match=str(process.pid)):
        refuse_held(tmp_path / "run", option="output_dir")
    process.kill()  # Not waited for: a zombie is dead too.
    time.sleep(0.2)
    with claimed(tmp_path / "run", option="output_dir"):
        assert json.loads((tmp_path / "run" / CLAIM).read_text())["pid"] == os.getpid()
    process.communicate()
    assert not list((tmp_path / "run").iterdir())


def test_another_process_with_the_number_of_a_dead_one_does_not_hold(tmp_path: Path) -> None:
    write_claim(tmp_path / "run", pid=os.getppid(), process_started=1.0)
    with claimed(tmp_path / "run", option="output_dir"):
        pass


@pytest.mark.usefixtures("quick")
def test_a_holder_on_another_machine_that_is_silent_is_replaced(tmp_path: Path) -> None:
    write_claim(tmp_path / "run", host="node7", machine="other")
    started = time.monotonic()
    with claimed(tmp_path / "run", option="output_dir"):
        assert 0.8 < time.monotonic() - started < 5


@pytest.mark.usefixtures("quick")
def test_a_holder_on_another_machine_that_lives_is_named(tmp_path: Path) -> None:
    """A second machine is a process whose machine has another name; the heartbeat alone shows that it lives."""
    holder = write_claim(tmp_path / "run", host="node7", machine="other", pid=41)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.1):
            os.utime(tmp_path / "run" / CLAIM)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        named = re.escape(f"process 41 on node7, since {holder.started}")
        with pytest.raises(UserError, match=named), claimed(tmp_path / "run", option="output_dir"):
            pass
    finally:
        end.set()
        thread.join()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', "\x00" * 40])
def test_a_damaged_claim_is_replaced_after_silence(content: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CLAIM).write_text(content)
    with claimed(tmp_path / "run", option="output_dir"):
        pass
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.usefixtures("quick")
def test_a_holder_that_was_replaced_ends(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", option="output_dir") as check:
        check()
        write_claim(tmp_path / "run", host="node7", machine="other")
        time.sleep(0.3)
        with pytest.raises(VerificationError, match="node7"):
            check()
    assert (tmp_path / "run" / CLAIM).exists()


def test_the_heartbeat_touches_the_claim(tmp_path: Path, quick: None) -> None:
    with claimed(tmp_path / "run", option="output_dir"):
        os.utime(tmp_path / "run" / CLAIM, (1, 1))
        time.sleep(0.3)
        assert (tmp_path / "run" / CLAIM).stat().st_mtime > 1


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(claim.os, "link", link)
    with claimed(tmp_path / "run", option="output_dir"):
        assert claim._read(tmp_path / "run" / CLAIM)
        assert not claim._create(tmp_path / "run" / CLAIM, Holder.this_process())
    assert not (tmp_path / "run").exists()


def test_a_claim_covers_what_is_started_inside_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", option="output_dir"):
        before = (tmp_path / "run" / CLAIM).read_text()
        with claimed(tmp_path / "run", option="output_dir"):
            pass
        assert (tmp_path / "run" / CLAIM).read_text() == before
        with claimed(tmp_path / "other", option="output_dir"):
            refuse_held(tmp_path / "run", option="output_dir")
        refuse_held(tmp_path / "run", option="output_dir")
    assert "PEFTCHAT_CLAIM" not in os.environ


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path / "a" / "b", option="output_dir"):
        raise KeyError
    assert not (tmp_path / "a").exists()


def test_what_belongs_to_a_claim() -> None:
    assert is_claim(Path("run/.claim.1f.tmp"))
    assert not is_claim(Path("run/claim"))
