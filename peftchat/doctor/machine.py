"""The machine: GPUs, memory, disk, shared memory, file handles, compiler, hub, clock."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from peftchat.doctor.findings import Finding
from peftchat.formatting import format_bytes
from peftchat.planning.hardware import system_memory

_GIB = 2**30
_LEAST_DISK = 2 * _GIB
_ENOUGH_DISK = 20 * _GIB
_ENOUGH_MEMORY = 4 * _GIB
_ENOUGH_SHARED_MEMORY = _GIB
"""NCCL and data loaders share memory between processes; Docker's default of 64 MB is too little for either."""
_ENOUGH_FILES = 4096
_CLOCK_TOLERANCE = 300.0
"""Seconds by which a new file's time may differ from the clock."""


def examine_machine() -> Iterator[Finding]:
    """Yield what this machine offers and lacks, without running any library's kernels."""
    yield from examine_devices()
    yield examine_cores()
    yield examine_memory()
    yield from examine_disks()
    yield examine_shared_memory()
    yield examine_file_handles()
    yield examine_compiler()
    yield examine_hub()
    yield examine_clock()


def examine_devices() -> Iterator[Finding]:
    """Yield each GPU, or why torch uses none."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            numbers = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
            found = f"{properties.name}, {format_bytes(free)} of {format_bytes(total)} free, {numbers}"
            if free < total / 2:
                yield Finding(f"GPU {index}", "warning", found, "Another process uses it: see `nvidia-smi`.")
            else:
                yield Finding(f"GPU {index}", "ok", found)
        return
    if torch.backends.mps.is_available():
        yield Finding("GPU", "note", "Apple's: `chat` uses it, training runs on the CPU")
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        cure = "Install torch for your driver: https://pytorch.org/get-started/locally/"
        yield Finding(
            "GPU", "problem", f"this machine has NVIDIA's tools, but torch {torch.__version__} has no CUDA", cure
        )
    elif torch.version.cuda is not None:
        cure = "Install a driver, or pass the GPUs on (`docker run --gpus all`). CUDA_VISIBLE_DEVICES may hide them."
        yield Finding("GPU", "problem", f"torch is built for CUDA {torch.version.cuda}, but no GPU is usable", cure)
    else:
        yield Finding("GPU", "note", "none; training runs on the CPU")


def examine_cores() -> Finding:
    """Return the cores that this process may use, beside what libraries are set to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > cores:
        cure = f"Set it to {cores} or less, or unset it."
        return Finding("CPU", "warning", f"{cores} cores, but OMP_NUM_THREADS is {threads}", cure)
    return Finding("CPU", "ok", f"{cores} cores")


def examine_memory() -> Finding:
    """Return the RAM that this process may use."""
    import psutil

    allowed, free = system_memory(), int(psutil.virtual_memory().available)
    found = f"{format_bytes(min(free, allowed))} of {format_bytes(allowed)} free"
    if min(free, allowed) < _ENOUGH_MEMORY:
        return Finding("memory", "warning", found, "End other programs, or raise the container's limit.")
    return Finding("memory", "ok", found)


def examine_disks() -> Iterator[Finding]:
    """Yield the free space of the working folder, of the hub's cache and of temporary files, one per file system."""
    from huggingface_hub.constants import HF_HUB_CACHE

    seen: set[int] = set()
    for subject, folder in (
        ("disk: working folder", Path.cwd()),
        ("disk: hub cache", Path(HF_HUB_CACHE)),
        ("disk: temporary files", Path(tempfile.gettempdir())),
    ):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        device = existing.stat().st_dev
        if device not in seen:
            seen.add(device)
            yield _examine_disk(subject, folder, existing)


def _examine_disk(subject: str, folder: Path, existing: Path) -> Finding:
    free = shutil.disk_usage(existing).free
    found = f"{format_bytes(free)} free in {folder}"
    if not os.access(existing, os.W_OK):
        return Finding(subject, "problem", f"{existing} cannot be written", "Choose another folder, or its owner.")
    if free < _LEAST_DISK:
        return Finding(subject, "problem", found, "Free some space: a checkpoint of a small model takes more.")
    if free < _ENOUGH_DISK:
        return Finding(subject, "warning", found, "Larger models and their checkpoints need more.")
    return Finding(subject, "ok", found)


def examine_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 - examined, not used
    """Return the size of the memory that processes share; Linux alone has such a folder."""
    if not folder.is_dir():
        if sys.platform == "linux":
            return Finding("shared memory", "warning", f"there is no {folder}", "Mount a tmpfs there.")
        return Finding("shared memory", "ok", "not limited by a folder on this system")
    usage = shutil.disk_usage(folder)
    found = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free in {folder}"
    if usage.free < _ENOUGH_SHARED_MEMORY:
        return Finding("shared memory", "warning", found, "In a container: `docker run --shm-size 8g` or `--ipc host`.")
    return Finding("shared memory", "ok", found)


def examine_file_handles() -> Finding:
    """Return how many files a process may hold open."""
    if sys.platform == "win32":
        return Finding("file handles", "ok", "not limited by the shell")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    found = "no limit" if soft == endless else f"{soft:,}"
    if soft != endless and soft < _ENOUGH_FILES:
        more = hard == endless or hard >= _ENOUGH_FILES
        cure = (
            f"ulimit -n {_ENOUGH_FILES}"
            if more
            else f"Raise the hard limit of {hard:,} (Docker: `--ulimit nofile=65536`)."
        )
        return Finding("file handles", "warning", found, cure)
    return Finding("file handles", "ok", found)


def examine_compiler() -> Finding:
    """Return the C++ compiler that compiled layers and DeepSpeed's operators need."""
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, ("g++", "clang++", "cl"))), None)
    if found is not None:
        return Finding("C++ compiler", "ok", found)
    what = f"CXX names `{named}`, which is not on the PATH" if named else "none on the PATH"
    cure = "Install one (Debian: `apt install g++`), or set `training.torch_compile: false` and no offloading."
    return Finding("C++ compiler", "warning", what, cure)


def examine_hub() -> Finding:
    """Return whether the hub may be asked, and whether a token is there; the token itself is never shown."""
    from huggingface_hub import constants, get_token

    login = "a token is set" if get_token() else "no token: gated and private models cannot be downloaded"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "note", f"HF_HUB_OFFLINE is set: nothing is downloaded; {login}")
    return Finding("hub", "ok" if get_token() else "note", login, None if get_token() else "Run `hf auth login`.")


def examine_clock() -> Finding:
    """Return whether the clock is later than the installed package and agrees with the file system's."""
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    cure = "Set the clock (`timedatectl set-ntp true`): certificates and the age of checkpoints depend on it."
    built = max((_time_of(name) for name in ("peftchat", "torch", "transformers")), default=0.0)
    if now < built:
        return Finding("clock", "problem", f"{shown}, before the installation of peftchat's libraries", cure)
    with tempfile.NamedTemporaryFile(dir=Path.cwd() if os.access(Path.cwd(), os.W_OK) else None) as file:
        difference = Path(file.name).stat().st_mtime - now
    if abs(difference) > _CLOCK_TOLERANCE:
        return Finding("clock", "warning", f"{shown}; the file system's differs by {difference:,.0f} s", cure)
    return Finding("clock", "ok", shown)


def _time_of(package: str) -> float:
    """Return when a package was installed, in seconds since the epoch; 0 where that cannot be read."""
    try:
        files = metadata.distribution(package).files or []
        return max((Path(str(file.locate())).stat().st_mtime for file in files if file.name == "METADATA"), default=0.0)
    except (metadata.PackageNotFoundError, OSError):
        return 0.0
