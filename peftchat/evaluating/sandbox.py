"""Run programs that a model wrote, each in a process of its own that has given up files, network and processes.

What holds on this machine is tried first, with a program that attempts all of it. This is no prison for a program that
is made to break out of one: run models that you do not trust in a virtual machine.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.errors import UserError

CPU_SECONDS = 10
_WALL_SECONDS = 60.0
"""A machine with other work gives a program its processor time later."""

MEMORY_BYTES = 1 << 30
_FILE_BYTES = 1 << 20
_REPORT_BYTES = 4096
_RUNNER = Path(__file__).with_name("sandbox_runner.py")

_PROBE = """
import json, os, socket
found = []
def tries(what, attempt):
    try:
        attempt()
    except Exception:
        return
    found.append(what)
def fork():
    if os.fork() == 0:
        os._exit(0)
tries("read a file outside its folder", lambda: open({outside!r}).read())
tries("write a file outside its folder", lambda: open({beside!r}, "w").write("x"))
tries("reach the network", lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2))
tries("start processes", fork)
tries("signal other processes", lambda: os.kill(os.getppid(), 0))
if {canary!r} in os.environ.values():
    found.append("read the environment")
import collections, heapq, itertools, math, re, string, typing
assert not found, json.dumps(found)
"""


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How a program ended.

    Attributes:
        passed: whether it came to its end without an error.
        error: what it raised or why it was ended; None if it passed.
    """

    passed: bool
    error: str | None


def run_program(source: str, *, cpu_seconds: int = CPU_SECONDS, wall_seconds: float = _WALL_SECONDS) -> ProgramEnd:
    """Run a program with a folder of its own and nothing else.

    It passes only if it comes to its end: one that leaves early, by `sys.exit` or `os._exit`, does not.

    Args:
        source: Python.
        cpu_seconds: of processor time.
        wall_seconds: of time.
    """
    nonce = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="peftchat-program-")).resolve()
    readable, writable = os.pipe()
    limits = {"cpu_seconds": cpu_seconds, "memory_bytes": MEMORY_BYTES, "file_bytes": _FILE_BYTES}
    request = {"program": source, "nonce": nonce, "folder": str(folder), "limits": limits}
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_RUNNER), str(writable)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"},
            pass_fds=(writable,),
            start_new_session=True,
        )
        os.close(writable)
        writable = -1
        late = False
        try:
            process.communicate(json.dumps(request).encode(), timeout=wall_seconds)
        except subprocess.TimeoutExpired:
            late = True
        except BrokenPipeError:
            process.wait()
        finally:
            _kill_session(process)
        os.set_blocking(readable, False)
        return _end(_read(readable), nonce, process.returncode, late)
    finally:
        os.close(readable)
        if writable >= 0:
            os.close(writable)
        shutil.rmtree(folder, ignore_errors=True)


def run_programs(sources: Sequence[str]) -> list[ProgramEnd]:
    """Run programs side by side, one per core and at most four, and return how each ended."""
    with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2))) as pool:
        return list(pool.map(run_program, sources))


def open_doors() -> list[str]:
    """Try what a program could do beside its work on this machine, and return what it can.

    Raises:
        UserError: programs cannot be run here at all.
    """
    canary = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="peftchat-outside-") as name, socket.create_server(("127.0.0.1", 0)) as net:
        outside, beside = Path(name) / "canary", Path(name) / "written"
        outside.write_text(canary)
        probe = _PROBE.format(outside=str(outside), beside=str(beside), port=net.getsockname()[1], canary=canary)
        os.environ["PEFTCHAT_CANARY"] = canary
        try:
            end = run_program(probe)
        finally:
            del os.environ["PEFTCHAT_CANARY"]
    if end.passed:
        return []
    kind, _, found = (end.error or "").partition(": ")
    if kind == "AssertionError" and found.startswith("["):
        doors: list[str] = json.loads(found)
        return doors
    raise UserError(f"programs cannot be run on this machine: {end.error}", where="--run-code")


def require_sandbox(*, allow_open: bool) -> list[str]:
    """Check that programs are held, and return what they can do nevertheless.

    Args:
        allow_open: go on although they are not held.

    Raises:
        UserError: they are not held, and that is not allowed.
    """
    if os.name != "posix":
        raise UserError("programs are run on Linux and macOS only", where="--run-code")
    doors = open_doors()
    if doors and not allow_open:
        raise UserError(
            f"a program of the model could {', '.join(doors)} on this machine",
            where="--run-code",
            hint="Run it in a container or a virtual machine, and add `--open-sandbox` there.",
        )
    return doors


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _read(readable: int) -> bytes:
    try:
        return os.read(readable, _REPORT_BYTES)
    except BlockingIOError:
        return b""


def _end(report: bytes, nonce: str, status: int, late: bool) -> ProgramEnd:
    try:
        found: dict[str, Any] = json.loads(report)
        if found["nonce"] == nonce:
            return ProgramEnd(bool(found["passed"]), found["error"])
    except (ValueError, KeyError, TypeError):
        pass
    if late or status in (-signal.SIGXCPU, -signal.SIGKILL):
        return ProgramEnd(False, "took too long")
    return ProgramEnd(False, f"ended by itself with status {status}" if status >= 0 else f"ended by signal {-status}")
