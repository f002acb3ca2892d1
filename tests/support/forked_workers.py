"""The processes of a run as forks of their launcher, which has imported everything: they start at once.

They are the launcher's own children all the same, in groups of their own, with its standard error. What a fresh
interpreter would not have is undone: signal handlers, open files, and the request for a checkpoint.
"""

import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fork_server import Request, run

RUN_PEFTCHAT = """
import runpy, sys
sys.argv[0:1] = []
runpy.run_module("peftchat", run_name="__main__", alter_sys=True)
"""
"""Behind `-c` and with `peftchat …` as arguments: what `-m peftchat …` does."""


_kept: list[Any] = []


@dataclass
class ForkedWorker:
    """What the launcher uses of a `subprocess.Popen`."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """The status, or None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait for the end, and return the status."""
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def launch_with_forks(arguments: Sequence[str], before: str = "") -> None:
    """Run `peftchat` with these arguments; processes that it launches are forks.

    Args:
        arguments: the command line after `peftchat`.
        before: code that each of them runs first.
    """
    from peftchat.training import launch

    def start(self: Any, rank: int) -> ForkedWorker:
        environment = {**self._environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return _fork(before, self._command[2:], environment)

    launch._Processes._start = start  # type: ignore[method-assign, assignment]
    sys.argv = ["peftchat", *arguments]
    runpy.run_module("peftchat", run_name="__main__", alter_sys=True)


def _fork(before: str, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedWorker:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child:
        return ForkedWorker(child)
    from peftchat.interruption import CHECKPOINT

    # Without a reference they would close the descriptors that the process takes over.
    _kept.extend((sys.stdin, sys.stdout, sys.stderr))
    os.setpgid(0, 0)
    CHECKPOINT.hand_on = None
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    # The launcher's store is one of them: its port must close with the launcher.
    os.closerange(3, 1 << 16)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    run(Request(["-c", before + RUN_PEFTCHAT, *arguments], dict(environment), str(Path.cwd())))
