"""Give memory back to the system as soon as a tensor is gone."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
_LARGE = 1 << 20


def return_large_blocks() -> None:
    """Make glibc map every block of a megabyte or more on its own, for the rest of the process.

    By default it raises that limit to the size of whatever was freed last, up to 32 MB, and then keeps such blocks in a
    heap that fragments: streaming a 2.2 GB model through this process held 1.4 GB at its peak, against 0.8 GB with the
    limit fixed. Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
