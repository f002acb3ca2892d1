"""Failed writes: what the disk had to say, where a library has words of its own for it."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from peftchat.training.preflight import is_disk_full

_TORCH = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")
"""How `torch.save` fails: https://github.com/pytorch/pytorch/blob/v2.8.0/caffe2/serialize/inline_container.cc"""

_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers name the system's error."""


def disk_error(error: BaseException, folder: Path) -> OSError | None:
    """Return the disk's error that another error comes from; None if the disk is not to blame.

    Args:
        error: what ended the run.
        folder: where the run writes.
    """
    number = errno.ENOSPC if is_disk_full(folder) else _number(error)
    return None if number is None else OSError(number, os.strerror(number), str(folder))


def _number(error: BaseException) -> int | None:
    for one in _chain(error):
        # It knows the file too.
        if isinstance(one, OSError):
            return None
        named = _RUST.search(str(one))
        if named is not None:
            return int(named[1])
        if isinstance(one, RuntimeError) and any(words in str(one) for words in _TORCH):
            # torch does not keep the number.
            return errno.EFBIG if _is_size_limited() else errno.EIO
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_size_limited() -> bool:
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
