"""Starting the processes of a run as a cluster's scheduler does: each with its rank, in forks of the server."""

import socket
import subprocess
import time
from typing import Literal

from tests.support.cli import Started, start


def peftchat_in_processes(
    processes: int, *arguments: object, timeout: float = 300, launcher: Literal["torchrun", "srun"] = "torchrun"
) -> subprocess.CompletedProcess[str]:
    """Run `peftchat` once per rank on this machine, with the variables that torchrun or `srun` would set.

    Returns:
        The first failure, or 0; standard output and standard error of all ranks, one after the other.
    """
    port = free_port()
    variables = _variables if launcher == "torchrun" else _slurm_variables
    ranks = [
        start("-m", "peftchat", *arguments, environment=variables(rank, processes, port)) for rank in range(processes)
    ]
    _end_together(ranks, timeout)
    ended = [rank.communicate() for rank in ranks]
    status = next((rank.wait() for rank in ranks if rank.wait()), 0)
    return subprocess.CompletedProcess(
        ranks[0].arguments, status, "".join(stdout for stdout, _ in ended), "".join(stderr for _, stderr in ended)
    )


def free_port() -> int:
    """Return a port of this machine that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _variables(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _slurm_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        # The port follows from the number of the job: 20000 and its last digits.
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": str(processes),
        "SLURM_STEP_TASKS_PER_NODE": str(processes),
        "SLURM_STEP_NODELIST": "localhost",
    }


def _end_together(ranks: list[Started], timeout: float) -> None:
    """Wait for all ranks; one that fails, or the time, ends the others, which would wait for it forever."""
    end = time.monotonic() + timeout
    while None in (states := [rank.poll() for rank in ranks]):
        if any(states) or time.monotonic() > end:
            for rank in ranks:
                rank.kill()
        time.sleep(0.01)
