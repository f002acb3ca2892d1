"""Several machines without a scheduler: torchrun's agent on each meets the others at MASTER_ADDR."""

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from peftchat.errors import UserError, VerificationError, first_line
from peftchat.interruption import CHECKPOINT, Interrupted
from peftchat.training.distributed import DistributedSetup
from peftchat.training.launcher_environment import check_port
from peftchat.training.process_group import LIMIT_VARIABLE, meeting_limit
from peftchat.training.route import Route, route_to

_PORT = "29500"
_WHERE = "MASTER_ADDR"
_POLL_SECONDS = 0.5


def this_route() -> Route:
    """Return the way to MASTER_ADDR.

    Raises:
        UserError: as `route_to`.
    """
    return route_to(os.environ[_WHERE], int(os.environ.get("MASTER_PORT") or _PORT))


def launch_on_machines(distributed: DistributedSetup, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Let torchrun's agent meet those of the other machines, and start the processes of this one.

    Returns:
        0, or the exit status of the first process that failed.

    Raises:
        UserError: MASTER_ADDR is missing or wrong, or the other machines do not come.
        VerificationError: a process was killed, or the first machine has ended.
        Interrupted: a signal ended the processes.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    endpoint = _endpoint(distributed)
    route, limit = this_route(), meeting_limit(os.environ)
    if not route.is_first:
        _wait_for_first(endpoint, limit)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.update(environment)
    config = LaunchConfig(
        min_nodes=distributed.nodes,
        max_nodes=distributed.nodes,
        nproc_per_node=distributed.processes,
        run_id="peftchat",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"is_host": route.is_first, "join_timeout": max(1, round(limit))},
        local_addr=route.address,
        max_restarts=0,
    )
    CHECKPOINT.hand_on = _hand_on_to_children
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        raise VerificationError(
            f"process {rank} was killed by signal {-failure.exitcode}"
            + (" (perhaps out of memory)" if failure.exitcode == -9 else "")
        ) from error
    except SignalException as error:
        raise Interrupted(error.sigval) from error
    except RendezvousTimeoutError as error:
        _leave_at_once(distributed)
        raise _not_met(
            f"the {distributed.nodes} machines did not all come to {endpoint} within {limit:g} seconds"
        ) from error
    except (RendezvousError, DistNetworkError) as error:
        _leave_at_once(distributed)
        if route.is_first:
            raise _not_met(f"no meeting at {endpoint}: {first_line(_cause(error))}") from error
        # Its store is what the others lose.
        raise VerificationError(f"the first machine, {endpoint}, has ended; it has said why") from error
    finally:
        CHECKPOINT.hand_on = None
    return 0


def _leave_at_once(distributed: DistributedSetup) -> None:
    """Let the process end as one of several do (`peftchat.interruption.leave`), without tearing the meeting down."""
    os.environ["WORLD_SIZE"] = str(distributed.world_size)


def _wait_for_first(endpoint: str, seconds: float) -> None:
    host, _, port = endpoint.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
                return
        except OSError as error:
            if time.monotonic() > end:
                what = f"nobody answers at {endpoint} within {seconds:g} seconds: {error.strerror or error}"
                raise _not_met(what) from error
        time.sleep(_POLL_SECONDS)


def _not_met(what: str) -> UserError:
    return UserError(
        what,
        where=f"{_WHERE}={os.environ[_WHERE]}",
        hint="Start the same command on all machines, also on the first one, whose port no firewall may close; "
        f"{LIMIT_VARIABLE} (seconds) gives them longer.",
    )


def _cause(error: Exception) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def _hand_on_to_children() -> None:
    """Ask the processes that torchrun's agent has started, if they train already: the signal ends one that does not."""
    import psutil

    number = CHECKPOINT.number
    for child in psutil.Process().children():
        with contextlib.suppress(OSError, psutil.Error):
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8", errors="replace")
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
            if number is not None and caught and int(caught[1], 16) >> (number - 1) & 1:
                child.send_signal(number)


def _endpoint(distributed: DistributedSetup) -> str:
    host = os.environ.get(_WHERE)
    if not host:
        raise UserError(
            f"the recipe asks for {distributed.nodes} machines, but MASTER_ADDR is not set",
            where="distributed.nodes",
            hint="Set MASTER_ADDR (and MASTER_PORT) on every machine to the first one, or start with srun or torchrun.",
        )
    port = os.environ.get("MASTER_PORT") or _PORT
    check_port(port, ("MASTER_PORT",))
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
