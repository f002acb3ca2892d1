"""Reopen what was written and compare it with what was planned."""

from pathlib import Path

from peftchat.errors import UserError, VerificationError
from peftchat.merging.plan import Plan
from peftchat.merging.shards import Checkpoint


def check_written(folder: Path, plan: Plan) -> None:
    """Open index and shards of the merged folder as any reader would: names, types, shapes, sizes.

    Values were checked for being finite on their way into the file.

    Raises:
        CheckFailed: says what differs.
    """
    try:
        written = Checkpoint.open(folder).entries
    except UserError as error:
        raise VerificationError(f"what was written cannot be read back: {error}") from error
    planned = {tensor.spec.name: tensor.spec for tensors in plan.shards.values() for tensor in tensors}
    if written.keys() != planned.keys():
        first = sorted(written.keys() ^ planned.keys())[0]
        raise VerificationError(f"{folder}: the tensors written are not those planned, first {first}")
    for name, spec in planned.items():
        entry = written[name]
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise VerificationError(
                f"{folder}: {name} is {entry.dtype} {list(entry.shape)}, planned {spec.dtype} {spec.shape}"
            )
        if entry.bytes == 0:
            raise VerificationError(f"{folder}: {name} has no elements")
