"""Child processes that end when the process that started them has gone."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_PARENT = "PEFTCHAT_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def child_environment(environment: Mapping[str, str] = os.environ, parent: int | None = None) -> dict[str, str]:
    """Return the environment for a child that must not outlive its parent, which is this process by default."""
    return {**environment, _PARENT: str(os.getpid() if parent is None else parent)}


def is_child(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether peftchat started this process."""
    return _PARENT in environment


def end_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """Have the kernel kill this process when its parent has gone, if the parent asked for it or is torchrun's agent.

    A launcher that is killed cannot end its processes, which would train on. Linux alone offers this.
    https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    parent = environment.get(_PARENT, "")
    if sys.platform != "linux" or not (parent.isdecimal() or "TORCHELASTIC_RUN_ID" in environment):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have gone before.
    if parent.isdecimal() and os.getppid() != int(parent) and not _is_running(int(parent)):
        os._exit(128 + signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # The name, in parentheses, may hold any character; the state follows it.
    return not status.rpartition(")")[2].lstrip().startswith("Z")
