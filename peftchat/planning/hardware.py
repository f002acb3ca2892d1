"""Hardware of a plan: a catalog GPU, this machine's GPUs, or CPU and RAM."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table

from peftchat.errors import UserError

Device = Literal["cuda", "cpu"]


_GIB = 2**30
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Hardware:
    """A kind of device and how many of it there are.

    Attributes:
        name: its name on the command line.
        label: its full name.
        device: `cuda` or `cpu`.
        count: the number of devices.
        memory: bytes that a process can use on each.
        tflops: dense 16-bit matrix rate of each in 10^12 operations per second; None if unknown.
        bandwidth: memory bandwidth in 10^9 bytes per second; None if unknown.
        bf16: whether it supports bfloat16.
        source: where the values come from.
    """

    name: str
    label: str
    device: "Device"
    count: int
    memory: int
    tflops: float | None
    bandwidth: float | None
    bf16: bool
    source: str


@cache
def gpu_catalog() -> Mapping[str, Hardware]:
    """Return the GPUs of the catalog by name."""
    entries = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))
    return {
        name: Hardware(
            name=name,
            label=entry["label"],
            device="cuda",
            count=1,
            memory=round(entry["memory_gib"] * _GIB),
            tflops=entry["tflops"],
            bandwidth=entry["bandwidth"],
            bf16=entry["bf16"],
            source=entry["source"],
        )
        for name, entry in entries.items()
    }


@cache
def _aliases() -> Mapping[str, str]:
    entries = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))
    return {_normalized(alias): name for name, entry in entries.items() for alias in (name, *entry["aliases"])}


def _normalized(name: str) -> str:
    """Return a name without case, vendor and separators."""
    return re.sub(r"nvidia|amd|geforce|instinct|tesla|[^a-z0-9]", "", name.lower())


def find_hardware(name: str | None, count: int | None) -> Hardware:
    """Return the device with a name; without a name, this machine's.

    Args:
        name: a GPU of the catalog, `cpu`, or None.
        count: how many; None for one, or for all of this machine's.

    Raises:
        UserError: the name is unknown.
    """
    if name is None:
        return this_machine(count)
    if _normalized(name) == "cpu":
        return this_cpu(count)
    known = _aliases().get(_normalized(name))
    if known is None:
        near = difflib.get_close_matches(_normalized(name), _aliases(), n=1, cutoff=0.4)
        hint = f"Did you mean `{_aliases()[near[0]]}`? " if near else ""
        names = ", ".join(gpu_catalog())
        raise UserError(f"`{name}` is not in the catalog", where="--gpu", hint=f"{hint}Use one of {names}, cpu.")
    return replace(gpu_catalog()[known], count=count or 1)


def this_machine(count: int | None) -> Hardware:
    """Return this machine's GPUs, or its CPU if it has none."""
    import torch

    available = torch.cuda.device_count()
    if not available:
        return this_cpu(count)
    properties = torch.cuda.get_device_properties(0)
    known = _aliases().get(_normalized(properties.name))
    rated = gpu_catalog().get(known) if known else None
    return Hardware(
        name=known or properties.name,
        label=f"{properties.name} (this machine)",
        device="cuda",
        count=count or available,
        memory=int(properties.total_memory),
        tflops=None if rated is None else rated.tflops,
        bandwidth=None if rated is None else rated.bandwidth,
        bf16=bool(torch.cuda.is_bf16_supported()),
        source="read from the driver",
    )


def this_cpu(count: int | None) -> Hardware:
    """Return this machine's CPU; several processes share its memory."""
    import os

    processes = count or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Hardware(
        name="cpu",
        label=f"CPU with {cores} cores (this machine)",
        device="cpu",
        count=processes,
        memory=system_memory() // processes,
        tflops=None,
        bandwidth=None,
        bf16=True,
        source="read from the system",
    )


def system_memory() -> int:
    """Return the RAM that this process may use, in bytes.

    It is the machine's, or its container's limit.
    """
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for file in _CGROUPS:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def gpu_table() -> Table:
    """Return a table of the GPUs in the catalog."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for title in ("name", "GPU"):
        table.add_column(title)
    for title in ("usable GiB", "TFLOP/s in 16 bits", "GB/s"):
        table.add_column(title, justify="right")
    table.add_column("source", style="dim")
    for gpu in gpu_catalog().values():
        numbers = (f"{gpu.memory / 2**30:.1f}", f"{gpu.tflops:g}", f"{gpu.bandwidth:,.0f}")
        table.add_row(gpu.name, gpu.label, *numbers, gpu.source)
    return table
