"""DeepSpeed's compiled kernels: what a run waits for, and what a killed run leaves behind.

DeepSpeed compiles kernels on first use, one folder each, with a file named `lock` beside them. Two things need mending:

- On a CPU it compiles an all-reduce in shared memory in every process group. Only its inference engine calls it
  (`TorchBackend.inference_all_reduce`), and the compiler needs 30 seconds to a few minutes.
  https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/comm/torch.py
- A process that is killed while it compiles leaves its lock, and every later run waits for it without end.
  https://github.com/pytorch/pytorch/blob/main/torch/utils/file_baton.py
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from peftchat.console import stderr


def leave_out_inference_kernels() -> None:
    """Keep DeepSpeed from compiling the kernel of its inference engine when it joins a process group."""
    # As an attribute, `deepspeed.comm.torch` is torch itself.
    backend: Any = import_module("deepspeed.comm.torch")
    if not hasattr(backend, "build_shm_op"):
        raise AttributeError("DeepSpeed has no build_shm_op any more; leave_out_inference_kernels can go")
    backend.build_shm_op = lambda: None


def remove_dead_locks() -> list[Path]:
    """Remove locks of compilers that no longer run, and print their names.

    A process keeps the file open for as long as it compiles. Where open files cannot be listed, nothing is removed.

    Returns:
        The locks that were removed.
    """
    if not Path("/proc/self/fd").is_dir():
        return []
    locks = {path.resolve() for path in _kernel_folder().glob("*/lock")}
    dead = sorted(locks - set(_open_files())) if locks else []
    for lock in dead:
        lock.unlink(missing_ok=True)
        stderr.print(
            f"Removed {lock}: the process that compiled a kernel of DeepSpeed there was killed.",
            markup=False,
            highlight=False,
        )
    return dead


def _kernel_folder() -> Path:
    from torch.utils import cpp_extension

    # The folder above an extension's own, which torch creates if it is asked for one.
    return Path(cpp_extension._get_build_directory("", verbose=False))


def _open_files() -> Iterator[Path]:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield link.readlink()
        except OSError:
            # The process has ended, or belongs to another user.
            continue
