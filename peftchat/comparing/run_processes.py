"""Processes of a comparison: one for each run and each evaluation, forked from a server where that is possible."""

import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

import psutil

from peftchat.child_process import child_environment
from peftchat.files import write_text

_POLL_SECONDS = 0.1
_TERMINATE_SECONDS = 30.0
_ANSI_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class RunProcesses:
    """Runs Python modules one after another, each in a process of its own; use it as a context manager.

    Args:
        fork: whether to fork the processes from a server that has imported the libraries; otherwise, and where that is
            not safe, each is a new interpreter.
    """

    def __init__(self, *, fork: bool = True) -> None:
        self._fork = fork and can_fork()
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        server = self._server
        if server is None:
            return
        self._server = None
        for stream in (server.stdin, server.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        try:
            server.wait(_TERMINATE_SECONDS if error is None else 1)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

    def run(self, arguments: Sequence[str], log: Path, watch: Callable[[], None]) -> str | None:
        """Run `python -m ARGUMENTS` until it ends, with its output in `log`.

        Args:
            arguments: the module and its arguments.
            log: the file for standard output and standard error.
            watch: called several times per second while the process runs.

        Returns:
            None if it succeeded, else the reason in one line.
        """
        pid_file = log.with_suffix(".pid")
        _end_leftover(pid_file)
        status = self._forked(arguments, log, pid_file, watch) if self._fork else None
        if status is None:
            status = _started(arguments, log, pid_file, watch)
        return None if status == 0 else _failure_reason(status, log)

    def _forked(self, arguments: Sequence[str], log: Path, pid_file: Path, watch: Callable[[], None]) -> int | None:
        """Return the exit status of a fork; None if there is no server to fork it."""
        server = self._server or _start_server()
        self._server = server
        assert server.stdin is not None and server.stdout is not None
        try:
            server.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}).encode() + b"\n")
            server.stdin.flush()
            first = _read_line(server.stdout, watch)
        except BrokenPipeError:
            first = b""
        if not first:
            # The server could not import a library: the new process will say so in its log.
            self._fork = False
            return None
        with _noted(int(first), pid_file):
            last = _read_line(server.stdout, watch)
        if last:
            return int(last)
        self._fork = False
        return 1


def can_fork() -> bool:
    """Return whether processes can be forked from one that has imported torch.

    Forks of a process that has touched a GPU cannot use it, and outside Linux system libraries do not survive a fork.
    """
    return sys.platform == "linux" and not any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))


def _start_server() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "peftchat.comparing.run_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
        bufsize=0,
    )


def _read_line(stream: IO[bytes], watch: Callable[[], None]) -> bytes:
    """Read a line of an unbuffered stream; empty if the server has ended."""
    while not select.select([stream], [], [], _POLL_SECONDS)[0]:
        watch()
    return stream.readline()


class _noted:  # noqa: N801 - used as a function
    """Notes a process in a file while it runs, and ends it if the block is left before it has ended."""

    def __init__(self, pid: int, pid_file: Path) -> None:
        self._pid, self._pid_file = pid, pid_file
        self._process: psutil.Process | None = None

    def __enter__(self) -> None:
        # A fork that ends at once may have been waited for already.
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(self._pid)
            write_text(self._pid_file, f"{self._pid} {self._process.create_time()}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._process is not None:
            _end(self._process)
        self._pid_file.unlink(missing_ok=True)


def _started(arguments: Sequence[str], log: Path, pid_file: Path, watch: Callable[[], None]) -> int:
    """Return the exit status of a process with an interpreter of its own."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=child_environment(),
        )
    with _noted(process.pid, pid_file):
        while process.poll() is None:
            watch()
            time.sleep(_POLL_SECONDS)
    return process.wait()


def _end_leftover(pid_file: Path) -> None:
    """End the child process of an earlier comparison that was killed.

    Two processes must not write one run.
    """
    if not pid_file.is_file():
        return
    pid, _, created = pid_file.read_text(encoding="utf-8").partition(" ")
    with suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid))
        # The number may belong to another process by now.
        if f"{process.create_time()}" == created:
            _end(process)
    pid_file.unlink()


def _end(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        family = [*process.children(recursive=True), process]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=_TERMINATE_SECONDS)
        for member in alive:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def _failure_reason(status: int, log: Path) -> str:
    if status < 0:
        return f"ended by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"ended with status {status}"
    lines = _ANSI_CODE.sub("", text).splitlines()
    for line in reversed(lines):
        for prefix in ("Error: ", "Failed: "):
            if line.startswith(prefix):
                return line.removeprefix(prefix)
    # A traceback ends with the exception.
    return next((line.strip() for line in reversed(lines) if line.strip()), f"ended with status {status}")
