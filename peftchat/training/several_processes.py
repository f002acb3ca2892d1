"""What one of several processes of a run says when it fails."""

import os
import time

_OTHERS_FIRST_SECONDS = 5.0


def is_main_process() -> bool:
    """Whether this is the only process of a run, or the first one."""
    return os.environ.get("RANK", "0") == "0"


def let_others_speak() -> None:
    """Wait a little, for a launcher to end this process because of another one, which has said what is wrong.

    Processes that share a mistake, such as a wrong recipe, all find it; the first one tells it. What this process
    alone has met is told after the wait.
    """
    time.sleep(_OTHERS_FIRST_SECONDS)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    from torch.distributed import DistError

    # gloo raises a plain RuntimeError.
    return isinstance(error, DistError) or "/gloo/" in str(error) or "closed by peer" in str(error)
