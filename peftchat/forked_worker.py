"""A fork of this process that calls one function for it, with arguments and results through pipes."""

import gc
import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Generic, NoReturn, TypeVar

from peftchat.child_process import child_environment, end_with_parent
from peftchat.errors import UserError

A = TypeVar("A")
R = TypeVar("R")

_BYTES_OF_SIZE = 8
_PIPE_BYTES = 2**20
"""What one call returns mostly fits into the pipe, so that a worker goes on while others are waited for."""


def usable_cores() -> int:
    """Return how many processes can work at once: 1 where a process cannot go on as two."""
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0))


class ForkedWorker(Generic[A, R]):
    """A process that calls a function, and two pipes: from it, and to it.

    It is a fork: it has nothing to import, and the caller's script need not be one that can be imported. Whatever locks
    other threads hold at that moment stay locked in it, so that none should be at work. It has nothing open but its
    pipes, and ends with this process.

    Args:
        function: what it calls. Arguments and results must be such that they can be pickled.
        task: what it does, for the message when it is killed: "reads the file".
        where: the place that the message names.

    Raises:
        OSError: the system starts no more processes.
    """

    def __init__(self, function: Callable[[A], R], task: str, where: str | None = None) -> None:
        import fcntl  # not on Windows

        self._task, self._where = task, where
        source, target = os.pipe()
        asked, asking = os.pipe()
        with suppress(OSError):  # the system's limit; the smaller pipe will do
            fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        environment = child_environment({})
        try:
            self._pid = os.fork()
        except OSError:
            for descriptor in (source, target, asked, asking):
                os.close(descriptor)
            raise
        if self._pid:
            os.close(target)
            os.close(asked)
            self._results: BinaryIO = os.fdopen(source, "rb")
            self._requests: BinaryIO = os.fdopen(asking, "wb")
            return
        try:
            end_with_parent(environment)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
            for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(ending, signal.SIG_DFL)
            _close_others(asked, target)
            _serve(function, asked, target)
        finally:
            os._exit(1)

    def ask(self, argument: A) -> None:
        """Let it call the function with one more argument."""
        with suppress(BrokenPipeError):  # `fetch` says that it is gone
            pickled = pickle.dumps(argument, pickle.HIGHEST_PROTOCOL)
            self._requests.write(len(pickled).to_bytes(_BYTES_OF_SIZE))
            self._requests.write(pickled)
            self._requests.flush()

    def fetch(self) -> R | None:
        """Return what the function returned for the next argument; None where it raised an exception.

        Raises:
            UserError: the process was ended from outside.
        """
        count, blocks = self._number(), []
        for _ in range(count):
            size = self._number()
            blocks.append(self._results.read(size))
            if len(blocks[-1]) < size:
                count = 0
        if not count:
            hint = "The system ends processes when memory runs out; look at `dmesg`."
            raise UserError(f"a process that {self._task} was ended from outside", where=self._where, hint=hint)
        found: R | None = pickle.loads(blocks[0], buffers=blocks[1:])  # noqa: S301 - from a fork, through a pipe
        return found

    def _number(self) -> int:
        return int.from_bytes(self._results.read(_BYTES_OF_SIZE))

    def end(self) -> None:
        """End the process, whatever it does."""
        self._results.close()
        with suppress(BrokenPipeError):
            self._requests.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _close_others(*kept: int) -> None:
    """Close what the process has open, but the standard streams and these."""
    for opened in list(Path("/proc/self/fd").iterdir()):
        descriptor = int(opened.name)
        if descriptor > 2 and descriptor not in kept:
            with suppress(OSError):  # the one that listed them
                os.close(descriptor)


def _serve(function: Callable[[A], R], asked: int, target: int) -> NoReturn:
    gc.freeze()  # the memory that both processes have stays one
    with os.fdopen(asked, "rb") as requests, os.fdopen(target, "wb") as results:
        while size := requests.read(_BYTES_OF_SIZE):
            argument: A = pickle.loads(requests.read(int.from_bytes(size)))  # noqa: S301 - from the process it is a fork of
            # What says that it may travel beside the pickle is copied once less.
            beside: list[pickle.PickleBuffer] = []
            try:
                found = pickle.dumps(function(argument), pickle.HIGHEST_PROTOCOL, buffer_callback=beside.append)
            except Exception:
                found, beside = pickle.dumps(None), []
            blocks = [memoryview(found), *(block.raw() for block in beside)]
            results.write(len(blocks).to_bytes(_BYTES_OF_SIZE))
            for block in blocks:
                results.write(len(block).to_bytes(_BYTES_OF_SIZE))
                results.write(block)
            results.flush()
    os._exit(0)
