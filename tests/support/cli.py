"""Running peftchat as a user runs it: arguments in, standard output, standard error and a status out.

`peftchat` and `start` fork a server that has imported torch and transformers already (`fork_server`): a process of its
own with true streams and a true status, at a fiftieth of the cost. `true_peftchat` starts a fresh interpreter instead,
for tests of what the interpreter's start itself does. Variables that libraries read while they are imported, such as
`HF_HOME`, act in a fresh interpreter alone.
"""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from json import dumps
from pathlib import Path
from typing import IO

PROJECT = Path(__file__).resolve().parents[2]

COMMAND = (sys.executable, "-m", "peftchat")
"""The command line of a fresh interpreter that runs peftchat."""

_START_LIMIT = 120.0
"""Seconds within which the server has to start."""


@dataclass
class Started:
    """A program that runs in a fork of the server.

    Attributes:
        pid: its process id.
        stdin: a pipe to its standard input.
        stdout: a file with what it has written so far.
        stderr: the same.
    """

    pid: int
    arguments: Sequence[str]
    stdin: IO[str]
    stdout: IO[str]
    stderr: IO[str]
    _connection: socket.socket
    returncode: int | None = field(default=None)

    def poll(self) -> int | None:
        """The status, or None while it runs."""
        with contextlib.suppress(TimeoutError):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Returns:
            The status; the negative number of the signal that ended it.

        Raises:
            TimeoutError: it still runs.
        """
        if self.returncode is None:
            # Zero would mean a socket that never waits and raises another error.
            self._connection.settimeout(timeout if timeout is None else max(timeout, 1e-3))
            self.returncode = int(_read_line(self._connection))
            self._connection.close()
        return self.returncode

    def next_line(self, timeout: float = 120) -> str:
        """Return the next line of standard output, without its newline.

        Raises:
            EOFError: it ended before.
            TimeoutError: it wrote none in time.
        """
        end = time.monotonic() + timeout
        line = ""
        while not line.endswith("\n"):
            has_ended = self.poll() is not None
            part = self.stdout.readline()
            line += part
            if not part and has_ended:
                raise EOFError(f"{self.arguments} ended\n{self.stderr.read()}")
            if time.monotonic() > end:
                raise TimeoutError(f"{self.arguments} wrote no line in {timeout} s\n{self.stderr.read()}")
            if not part:
                time.sleep(0.001)
        return line[:-1]

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without warning."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, stdin: str = "", timeout: float = 300) -> tuple[str, str]:
        """Write all of standard input, wait, and return all of standard output and standard error.

        Raises:
            TimeoutError: it still ran, and was killed.
        """
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(stdin)
        end = time.monotonic() + timeout
        try:
            self.wait(max(0.0, end - time.monotonic()))
        except TimeoutError:
            self.kill()
            raise TimeoutError(f"{self.arguments} ran for {timeout} s\n{self.stderr.read()}") from None
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()


def peftchat(
    *arguments: object,
    stdin: str = "",
    timeout: float = 300,
    cwd: Path | None = None,
    file_size_limit: int | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in a fork of the server.

    Args:
        file_size_limit: the most bytes that a file may take.
        environment: variables on top of this process's own.
    """
    started = start("-m", "peftchat", *arguments, cwd=cwd, file_size_limit=file_size_limit, environment=environment)
    stdout, stderr = started.communicate(stdin, timeout)
    return subprocess.CompletedProcess(started.arguments, started.wait(), stdout, stderr)


def true_peftchat(
    *arguments: object, stdin: str = "", timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh interpreter."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )


def start(
    *arguments: object,
    cwd: Path | None = None,
    file_size_limit: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Started:
    """Start `python ARGUMENTS` in a fork of the server: `-m MODULE …`, `-c CODE …` or `FILE …`.

    Standard output and standard error go to files, so that a program that nobody reads from never waits.
    """
    given = [str(argument) for argument in arguments]
    request = {
        "arguments": given,
        "environment": {**os.environ, **(environment or {})},
        "folder": str(cwd or Path.cwd()),
        "file_size_limit": file_size_limit,
    }
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(server_address())
    read_end, write_end = os.pipe()
    files = [tempfile.NamedTemporaryFile("w+b") for _ in range(2)]  # noqa: SIM115 - closed with the `Started`
    streams = [open(file.name, encoding="utf-8", newline="") for file in files]  # noqa: PTH123, SIM115
    try:
        socket.send_fds(connection, [(dumps(request) + "\n").encode()], [read_end, *(file.fileno() for file in files)])
    finally:
        os.close(read_end)
        for file in files:
            file.close()
    pid = int(_read_line(connection))
    started = Started(pid, given, os.fdopen(write_end, "w", encoding="utf-8"), *streams, connection)
    # A test that fails while it waits leaves its process running.
    atexit.register(started.kill)
    return started


def _read_line(connection: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1)  # The exit status of a short process may be behind this line already.
        if not part:
            raise RuntimeError("the fork server ended early")
        line += part
    return line.decode()


@cache
def server_address() -> str:
    """Return the address of this process's fork server, which starts at the first call and ends with this process."""
    folder = tempfile.mkdtemp(prefix="peftchat-tests-")
    address = str(Path(folder) / "socket")
    log = Path(folder) / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", address],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )

    def end() -> None:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    deadline = time.monotonic() + _START_LIMIT
    while not Path(address).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the fork server did not start:\n{log.read_text()}")
        time.sleep(0.02)
    return address
