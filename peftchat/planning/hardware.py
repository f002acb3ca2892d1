"""The place planned for: a card of the catalog, this machine's own, or its processor and main memory."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
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
    """One device, of which there may be several.

    Attributes:
        name: what it is called on the command line.
        label: what it is called elsewhere.
        device: `cuda` or `cpu`.
        count: how many there are.
        memory: bytes that a process can have on each.
        tflops: dense 16-bit matrix rate of each in 10^12 operations a second; None where it is not known.
        bandwidth: of its memory, in 10^9 bytes a second; None where it is not known.
        bf16: whether it computes in bfloat16.
        source: where the figures come from.
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
    """Every card of the catalog, by name."""
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
    return {_plain(alias): name for name, entry in entries.items() for alias in (name, *entry["aliases"])}


def _plain(name: str) -> str:
    """A name without what people leave out or put in: case, vendor, separators."""
    return re.sub(r"nvidia|amd|geforce|instinct|tesla|[^a-z0-9]", "", name.lower())


def find_hardware(name: str | None, count: int | None) -> Hardware:
    """The device that a name stands for; without one, the machine's own.

    Args:
        name: a card, `cpu`, or None.
        count: how many; None for one, or all that are here.

    Raises:
        UserError: nothing has that name.
    """
    if name is None:
        return this_machine(count)
    if _plain(name) == "cpu":
        return this_cpu(count)
    known = _aliases().get(_plain(name))
    if known is None:
        near = difflib.get_close_matches(_plain(name), _aliases(), n=1, cutoff=0.4)
        hint = f"Did you mean `{_aliases()[near[0]]}`? " if near else ""
        raise UserError(
            f"`{name}` is not in the catalog", where="--gpu", hint=f"{hint}Known: {', '.join(gpu_catalog())}, cpu."
        )
    return _with_count(gpu_catalog()[known], count or 1)


def this_machine(count: int | None) -> Hardware:
    """This machine's GPUs, or its processor where it has none."""
    import torch

    there = torch.cuda.device_count()
    if not there:
        return this_cpu(count)
    properties = torch.cuda.get_device_properties(0)
    known = _aliases().get(_plain(properties.name))
    rated = gpu_catalog().get(known) if known else None
    return Hardware(
        name=known or properties.name,
        label=f"{properties.name}, this machine's",
        device="cuda",
        count=count or there,
        memory=int(properties.total_memory),
        tflops=None if rated is None else rated.tflops,
        bandwidth=None if rated is None else rated.bandwidth,
        bf16=bool(torch.cuda.is_bf16_supported()),
        source="read from the driver",
    )


def this_cpu(count: int | None) -> Hardware:
    """This machine's processor; several processes share its memory."""
    import os

    processes = count or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Hardware(
        name="cpu",
        label=f"this machine's processor, {cores} cores",
        device="cpu",
        count=processes,
        memory=system_memory() // processes,
        tflops=None,
        bandwidth=None,
        bf16=True,
        source="read from the system",
    )


def system_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or the limit of its container."""
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


def _with_count(hardware: Hardware, count: int) -> Hardware:
    from dataclasses import replace

    return replace(hardware, count=count)


def gpu_table() -> Table:
    """Every card that `--gpu` knows."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for title in ("name", "card"):
        table.add_column(title)
    for title in ("GiB usable", "TFLOP/s in 16 bits", "GB/s"):
        table.add_column(title, justify="right")
    table.add_column("source", style="dim")
    for card in gpu_catalog().values():
        numbers = (f"{card.memory / 2**30:.1f}", f"{card.tflops:g}", f"{card.bandwidth:,.0f}")
        table.add_row(card.name, card.label, *numbers, card.source)
    return table
