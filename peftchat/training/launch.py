"""Launching the processes of a run, and waiting for them."""

import logging
import os
import sys
from collections.abc import Sequence

from peftchat.errors import UserError, VerificationError
from peftchat.training.distributed import DistributedSetup


def launch(distributed: DistributedSetup, arguments: Sequence[str]) -> int:
    """Run `peftchat` with these arguments in every process, and wait for them.

    Args:
        arguments: the command line after `peftchat`.

    Returns:
        0, or the exit status of the first process that failed; that process has reported its error.

    Raises:
        UserError: the recipe asks for several machines, and MASTER_ADDR is not set.
        VerificationError: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # The launcher would give every process a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // distributed.processes)))
    config = LaunchConfig(
        min_nodes=distributed.nodes,
        max_nodes=distributed.nodes,
        nproc_per_node=distributed.processes,
        run_id="peftchat",
        rdzv_backend="c10d",
        rdzv_endpoint=_rendezvous_endpoint(distributed),
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "peftchat", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        raise VerificationError(
            f"process {rank} was killed by signal {-failure.exitcode}"
            + (" (perhaps out of memory)" if failure.exitcode == -9 else "")
        ) from error
    return 0


def _rendezvous_endpoint(distributed: DistributedSetup) -> str:
    if distributed.nodes == 1:
        return "localhost:0"
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise UserError(
            f"the recipe asks for {distributed.nodes} machines, but MASTER_ADDR is not set",
            where="distributed.nodes",
            hint="Set MASTER_ADDR (and MASTER_PORT) on every machine to the first one, or start with srun or torchrun.",
        )
    return f"{host}:{os.environ.get('MASTER_PORT', '29500')}"
