"""Process group: the processes of a run meet within a time limit, and then train together."""

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from peftchat.console import stderr
from peftchat.errors import UserError, first_line
from peftchat.training.deepspeed_kernels import leave_out_inference_kernels, remove_dead_locks
from peftchat.training.launcher_environment import LaunchedProcess, read_environment
from peftchat.training.route import route_to

if TYPE_CHECKING:
    from torch.distributed import Store

    from peftchat.training.distributed import DistributedSetup

LIMIT_VARIABLE = "PEFTCHAT_RENDEZVOUS_TIMEOUT"
_LIMIT_SECONDS = 60.0
_NOTE_AFTER_SECONDS = 5.0
_POLL_SECONDS = 0.05
_JOINED = "joined"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others later on; transformers' `ddp_timeout`."""


def join_processes(distributed: "DistributedSetup") -> "Store | None":
    """Wait for the other processes of the run, and create torch's process group, for DeepSpeed too.

    It has to exist before the model is loaded: without one, DeepSpeed assumes a single process and does not shard.

    Args:
        distributed: the processes; one that no launcher started has nobody to wait for.

    Returns:
        The store that the processes share; None for one process, and where they have met before.

    Raises:
        UserError: the others did not come in time, they cannot connect, or DeepSpeed is not installed.
    """
    import torch.distributed

    process = read_environment(os.environ).process
    if distributed.launcher != "environment" or process is None:
        return None
    if distributed.uses_deepspeed and process.local_rank == 0:
        # Before the processes meet: behind that, one of them may already compile.
        remove_dead_locks()
    store = None
    if not torch.distributed.is_initialized():
        store = _Meeting(process, os.environ).wait()
        store.set_timeout(_COLLECTIVE_TIMEOUT)
        if not distributed.gpus:
            _name_interface(process)
        try:
            torch.distributed.init_process_group(
                "nccl" if distributed.gpus else "gloo",
                store=torch.distributed.PrefixStore("default_pg", store),
                rank=process.rank,
                world_size=process.world_size,
                timeout=_COLLECTIVE_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the processes cannot connect to each other: {first_line(error)}",
                where=f"process {process.rank} of {process.world_size}",
                hint="Name a network interface that all machines share: GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME.",
            ) from error
    if distributed.uses_deepspeed:
        _init_deepspeed(distributed)
    return store


def _name_interface(process: LaunchedProcess) -> None:
    """Let gloo use the network in which the machines meet; by itself it takes what the machine's own name resolves to.

    https://github.com/pytorch/pytorch/blob/v2.8.0/torch/csrc/distributed/c10d/ProcessGroupGloo.cpp
    """
    if process.local_world_size == process.world_size or os.environ.get(_GLOO_INTERFACE):
        return
    interface = route_to(process.master_addr, int(process.master_port)).interface
    if interface is not None:
        os.environ[_GLOO_INTERFACE] = interface


def _init_deepspeed(distributed: "DistributedSetup") -> None:
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"`{distributed.strategy}` needs DeepSpeed, which is not installed",
            where="distributed.strategy",
            hint="pip install 'peftchat[deepspeed]'",
        ) from error
    if not distributed.gpus:
        leave_out_inference_kernels()
    deepspeed.init_distributed(dist_backend="nccl" if distributed.gpus else "gloo", verbose=False)


class _Meeting:
    """Waits until all processes have come to the address that the launcher named.

    torch's own rendezvous waits inside C++, where a signal is not seen, and for half an hour.

    Args:
        process: this process.
        environment: holds the time limit.
    """

    def __init__(self, process: LaunchedProcess, environment: Mapping[str, str]) -> None:
        self._process = process
        self._seconds = meeting_limit(environment)
        self._started = time.monotonic()
        self._end = self._started + self._seconds
        # torchrun's agent holds the store of all its processes, and of each attempt.
        self._launcher_holds_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._noted = False

    @property
    def _address(self) -> str:
        return f"{self._process.master_addr}:{self._process.master_port}"

    def wait(self) -> "Store":
        """Return the store that all processes share.

        Raises:
            UserError: they did not come in time.
        """
        from torch.distributed import PrefixStore

        store = PrefixStore(f"peftchat/{self._attempt}", self._open())
        present = store.add(_JOINED, 1)
        while present < self._process.world_size:
            self._sleep(f"{present} of {self._process.world_size} processes came to {self._address}")
            present = store.add(_JOINED, 0)
        return store

    def _open(self) -> "Store":
        from torch.distributed import TCPStore

        holds = self._process.rank == 0 and not self._launcher_holds_store
        if not holds:
            self._wait_for_port()
        try:
            return TCPStore(
                self._process.master_addr,
                int(self._process.master_port),
                world_size=self._process.world_size,
                is_master=holds,
                timeout=timedelta(seconds=max(1.0, self._end - time.monotonic())),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError) as error:
            raise self._failed(f"no meeting at {self._address}: {first_line(error)}") from error

    def _wait_for_port(self) -> None:
        reason = f"nobody answers at {self._address}"
        while True:
            try:
                with socket.create_connection((self._process.master_addr, int(self._process.master_port)), timeout=2):
                    return
            except OSError as error:
                self._sleep(f"{reason}: {error.strerror or error}")

    def _sleep(self, what: str) -> None:
        now = time.monotonic()
        if now > self._end:
            raise self._failed(f"{what} within {self._seconds:g} seconds")
        if not self._noted and now > self._started + _NOTE_AFTER_SECONDS and self._process.local_rank == 0:
            self._noted = True
            stderr.print(
                f"Waiting for the {self._process.world_size} processes of the launcher at {self._address} "
                f"(RANK={self._process.rank}) …",
                markup=False,
                highlight=False,
            )
        time.sleep(_POLL_SECONDS)

    def _failed(self, message: str) -> UserError:
        return UserError(
            message,
            where=f"RANK={self._process.rank} WORLD_SIZE={self._process.world_size}",
            hint="Start all processes with torchrun, srun or mpirun; if they need longer to start, raise "
            f"{LIMIT_VARIABLE} (seconds). In an ordinary shell: `unset RANK WORLD_SIZE`.",
        )


def meeting_limit(environment: Mapping[str, str]) -> float:
    """Return how many seconds processes and machines wait for each other.

    Raises:
        UserError: the variable is not a number of seconds.
    """
    text = environment.get(LIMIT_VARIABLE, "").strip()
    if not text:
        return _LIMIT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(
            f"{LIMIT_VARIABLE}={text} is not a number of seconds", where="environment", hint="Write for example 300."
        )
    return seconds
