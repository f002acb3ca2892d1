"""Shared run folder: all processes of a run have to see the folder of the first one.

Every process writes its part of a checkpoint: its random state, and its shard of the optimizer with ZeRO. On machines
without a common file system these parts lie apart, and each resumed process would start from what its machine holds.
"""

import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.errors import UserError
from peftchat.files import appears

if TYPE_CHECKING:
    from torch.distributed import Store

_TOKEN, _SEEN = "run-folder/token", "run-folder/seen"


def check_shared(folder: Path, store: "Store", rank: int, world_size: int) -> None:
    """Check that every process sees a file that the first one writes into the run folder; each process calls it.

    Args:
        folder: the run folder, as this process names it.
        store: what the processes share.
        rank: this process.
        world_size: their number.

    Raises:
        UserError: one does not see it; all processes raise alike.
    """
    token: Path | None = None
    try:
        if rank == 0:
            # By this name it counts as a leftover if this process is killed here.
            token = folder / f".shared-{secrets.token_hex(8)}.tmp"
            folder.mkdir(parents=True, exist_ok=True)
            token.write_bytes(b"")
            store.set(_TOKEN, token.name)
        name = store.get(_TOKEN).decode()
        seen = appears(folder / name)
        store.set(f"{_SEEN}/{rank}", f"{int(seen)} {socket.gethostname()}: {folder.absolute()}")
        found = [store.get(f"{_SEEN}/{one}").decode().split(" ", 1) for one in range(world_size)]
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    blind = [rank for rank, (sees, _) in enumerate(found) if sees == "0"]
    if blind:
        raise UserError(
            f"process {blind[0]} does not see the run folder of process 0: {found[0][1]} and {found[blind[0]][1]} "
            f"are not the same folder ({len(blind)} of {world_size} processes)",
            where="output_dir",
            hint="Set output_dir to a folder on a file system that all machines mount, such as NFS or Lustre: each "
            "process writes its part of a checkpoint there.",
        )
