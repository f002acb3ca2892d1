"""No garbage collection while a large library is imported: what it makes stays, and a search goes through all of it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Turn garbage collection off for a while, and count all that was made meanwhile among what is old.

    The next full collection looks at it as at everything else.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # Both at once move everything into the oldest generation. What somebody froze stays frozen.
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.enable()
