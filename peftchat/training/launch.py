"""Starting the processes of a run with torch's elastic launcher."""

import logging
import os
import sys
from collections.abc import Sequence

from peftchat.errors import UserError, VerificationError
from peftchat.training.placement import Placement


def launch(placement: Placement, arguments: Sequence[str]) -> int:
    """Run `peftchat` with these arguments in every process and wait for all of them.

    Args:
        arguments: the command line after `peftchat`.

    Returns:
        0, or the status with which the first process to fail ended; it has told why.

    Raises:
        InputError: several machines are asked for and nothing says how they find each other.
        CheckFailed: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # The launcher would give every process a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // placement.processes)))
    config = LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=placement.processes,
        run_id="peftchat",
        rdzv_backend="c10d",
        rdzv_endpoint=_meeting_point(placement),
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "peftchat", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        raise VerificationError(
            f"process {rank} was ended by signal {-failure.exitcode}"
            + (" (the machine ran out of memory?)" if failure.exitcode == -9 else "")
        ) from error
    return 0


def _meeting_point(placement: Placement) -> str:
    if placement.nodes == 1:
        return "localhost:0"
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise UserError(
            f"the recipe asks for {placement.nodes} machines, and nothing says where they meet",
            where="distributed.nodes",
            cure="Set MASTER_ADDR (and MASTER_PORT) to the first machine everywhere, or start with srun or torchrun.",
        )
    return f"{host}:{os.environ.get('MASTER_PORT', '29500')}"
