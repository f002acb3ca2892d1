"""Run probes in processes of their own, so that a crash or a hang of a library becomes a finding."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from peftchat.child_process import child_environment
from peftchat.doctor.findings import Finding, Status

_SECONDS = 180.0
"""The longest a probe may take. ZeRO-3 may build an operator first."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Probe:
    """A computation of `probes.PROBES`, and what its failure means.

    Attributes:
        name: its function.
        subject: what it shows.
        cure: what to do where it fails.
        severity: the status of a failure.
        processes: how many processes it takes.
        package: the package without which it is left out.
    """

    name: str
    subject: str
    cure: str
    severity: Status = "problem"
    processes: int = 1
    package: str | None = None


PROBES = (
    Probe("attention", "attention on packs", "Reinstall torch for your hardware, or set `data.packing: false`."),
    Probe(
        "nf4",
        "NF4 (bitsandbytes)",
        "`pip install -U bitsandbytes`, or do without `method: qlora`.",
        "warning",
        package="bitsandbytes",
    ),
    Probe(
        "compiler",
        "torch.compile",
        "Install a C++ compiler and Python's headers, or set `training.torch_compile: false`.",
        "warning",
    ),
    Probe(
        "two_processes",
        "two processes",
        "Check firewall and interfaces (`NCCL_DEBUG=INFO`), or set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME.",
        "warning",
        processes=2,
    ),
    Probe(
        "zero3",
        "ZeRO-3 (DeepSpeed)",
        "`pip install -U --no-build-isolation deepspeed`; it is built against the installed torch.",
        "warning",
        processes=2,
        package="deepspeed",
    ),
)


def run_probe(probe: Probe, seconds: float = _SECONDS) -> Finding:
    """Run a probe and say what came of it.

    Args:
        probe: the probe.
        seconds: after which its processes are killed.
    """
    if probe.package is not None and find_spec(probe.package) is None:
        return Finding(probe.subject, "note", f"{probe.package} is not installed", probe.cure)
    with tempfile.TemporaryDirectory(prefix="peftchat-doctor-") as folder:
        return _run(probe, Path(folder), seconds)


def _run(probe: Probe, folder: Path, seconds: float) -> Finding:
    started = time.monotonic()
    running = [_start(probe, rank, folder) for rank in range(probe.processes)]
    try:
        while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
            if time.monotonic() - started > seconds:
                return Finding(probe.subject, probe.severity, f"no result after {seconds:.0f} s", probe.cure)
            time.sleep(_POLL_SECONDS)
    finally:
        _end(running)
    took = time.monotonic() - started
    failed = next((rank for rank, one in enumerate(running) if one.returncode), None)
    if failed is None:
        return Finding(probe.subject, "ok", f"{_read(folder / 'out-0').strip()}, in {took:.0f} s")
    return Finding(
        probe.subject, probe.severity, _reason(running[failed].returncode, folder / f"err-{failed}"), probe.cure
    )


def _start(probe: Probe, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(probe.processes)}
    environment = {**child_environment(), "OMP_NUM_THREADS": "1", **ranks}
    command = [sys.executable, "-m", "peftchat.doctor.probes", probe.name, str(folder / "meeting")]
    with (folder / f"out-{rank}").open("wb") as out, (folder / f"err-{rank}").open("wb") as err:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=os.name == "posix",
        )


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs, with its own children, such as a compiler that hangs."""
    for one in running:
        if one.poll() is None:
            if os.name == "posix":
                os.killpg(one.pid, 9)
            else:
                one.kill()
        one.wait()


def _reason(status: int, errors: Path) -> str:
    """Return why a process failed: its signal, or the error at the end of its traceback."""
    if status < 0:
        return f"the process was killed by signal {-status}"
    lines = [line for line in _read(errors).splitlines() if line.strip()]
    of_error = [line for line in lines if not line.startswith((" ", "[")) and ": " in line]
    return (of_error or lines or [f"status {status} without a message"])[-1].strip()[:300]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
