"""Launching the processes of a run, and waiting for them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from peftchat.child_process import child_environment
from peftchat.errors import VerificationError
from peftchat.interruption import CHECKPOINT, ENDING, DeferredSignals, Interrupted
from peftchat.training.distributed import DistributedSetup
from peftchat.training.machines import launch_on_machines

_POLL_SECONDS = 0.05

_STOP_SECONDS = 30.0
"""How long the others may take to end once one process has stopped; the last one may still be writing a checkpoint."""

_STOP_AT_ONCE_SECONDS = 5.0
"""The same after a second signal."""


def launch(distributed: DistributedSetup, arguments: Sequence[str]) -> int:
    """Run `peftchat` with these arguments in every process, and wait for them.

    Args:
        arguments: the command line after `peftchat`.

    Returns:
        0, or the exit status of the first process that failed; that process has reported its error.

    Raises:
        UserError: the recipe asks for several machines, and MASTER_ADDR is missing or wrong, or they do not meet.
        VerificationError: a process was killed.
        Interrupted: a signal ended the processes.
    """
    # The processes would share all cores.
    threads = str(max(1, (os.cpu_count() or 1) // distributed.processes))
    environment = {"OMP_NUM_THREADS": threads, **child_environment()}
    command = [sys.executable, "-m", "peftchat", *arguments]
    if distributed.nodes > 1:
        return launch_on_machines(distributed, command, environment)
    return _launch_here(distributed, command, environment)


def _launch_here(distributed: DistributedSetup, command: Sequence[str], environment: Mapping[str, str]) -> int:
    from datetime import timedelta

    from torch.distributed import TCPStore

    # The launcher holds the store, so that no port is chosen before it is taken.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    shared = {
        **environment,
        "WORLD_SIZE": str(distributed.processes),
        "LOCAL_WORLD_SIZE": str(distributed.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return _Processes(command, shared, distributed.processes).wait()


class _Processes:
    """The processes of a run on this machine.

    Args:
        command: what each runs.
        environment: the variables that all share.
        count: their number.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        self._command = command
        self._environment = environment
        self._count = count
        self._all: list[subprocess.Popen[bytes]] = []
        self._signals = _Forwarded()
        self._stopped_by: int | None = None
        self._deadline: float | None = None

    def wait(self) -> int:
        """Start the processes, hand signals on to them, and wait until all have ended.

        Returns:
            0, or the status of the first process that failed.

        Raises:
            VerificationError: a process was killed.
            Interrupted: a signal ended them before the first could say so.
        """
        self._signals.begin()
        CHECKPOINT.hand_on = self._ask_for_checkpoint
        try:
            for rank in range(self._count):
                with CHECKPOINT.blocked():
                    self._all.append(self._start(rank))
            failed = self._wait()
        finally:
            CHECKPOINT.hand_on = None
            self._kill()
            self._signals.end()
        if self._stopped_by is not None:
            # Unless it was killed, the first process has said so.
            if self._all[0].returncode < 0:
                raise Interrupted(self._stopped_by)
            return 128 + self._stopped_by
        if failed is None:
            return 0
        rank, status = failed
        if status > 0:
            return status
        raise VerificationError(
            f"process {rank} was killed by {signal.Signals(-status).name}"
            + (" (perhaps out of memory)" if status == -signal.SIGKILL else "")
        )

    def _start(self, rank: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command,
            env={**self._environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            # A terminal sends Ctrl-C to its whole group: it would arrive twice.
            process_group=0,
        )

    def _wait(self) -> tuple[int, int] | None:
        """Wait for all; return rank and status of the first that failed."""
        while True:
            for number in self._signals.take():
                self._stop(number, _STOP_AT_ONCE_SECONDS if self._stopped_by is not None else None)
            statuses = [process.poll() for process in self._all]
            failed = next(((rank, status) for rank, status in enumerate(statuses) if status), None)
            if failed is not None and not self._is_stop(failed[1]):
                self._stopped_by = None
                return failed
            if failed is not None and self._deadline is None:
                # One has stopped, perhaps by a signal of its own: the others follow.
                if self._stopped_by is None:
                    self._stop(abs(failed[1]) % 128, None)
                self._deadline = time.monotonic() + _STOP_SECONDS
            if None not in statuses:
                return failed
            if self._deadline is not None and time.monotonic() > self._deadline:
                return failed
            time.sleep(_POLL_SECONDS)

    def _is_stop(self, status: int) -> bool:
        """Whether a status is that of a process which a signal has stopped in an orderly way."""
        numbers = {int(number) for number in (signal.SIGINT, *ENDING)}
        return abs(status) % 128 in numbers and (status > 128 or status < 0)

    def _stop(self, number: int, seconds: float | None) -> None:
        self._stopped_by = self._stopped_by or number
        if seconds is not None:
            self._deadline = time.monotonic() + seconds
        self._send(number)

    def _ask_for_checkpoint(self) -> None:
        if CHECKPOINT.take() and CHECKPOINT.number is not None:
            self._send(CHECKPOINT.number)

    def _send(self, number: int) -> None:
        for process in self._all:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _kill(self) -> None:
        self._send(signal.SIGKILL)
        for process in self._all:
            process.wait()


class _Forwarded(DeferredSignals):
    """Collects the signals that are to be handed on to the processes."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: list[int] = []

    def take(self) -> list[int]:
        """Return the signals that have come since the last call."""
        numbers, self._taken = self._taken, []
        return numbers

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first = self.number is None
        super()._note(number, frame)
        if is_first:
            self._taken.append(number)

    def again(self, number: int) -> None:
        """Hand a further signal on too."""
        self._taken.append(number)
