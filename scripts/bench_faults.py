"""Inject faults into real runs, resume each run, and write the table of docs/faults.md from what happened.

    python scripts/bench_faults.py [--only NAME] [--json FILE] [--write]

Each fault hits a small run: its processes are killed or stopped, its disk fills up, its memory runs out, a checkpoint
is damaged. The table tells what the user saw, the exit status, what was left on disk, and how `--resume` went on. A run
must end with the losses of one that nobody disturbed. Disks of their own are mounted, which Linux permits root alone.
All processes are forks of one that has imported everything.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from page_tables import write_table

from peftchat.files import write_text
from tests.support.cli import Started, start
from tests.support.data import read_json_lines, write_small_talk
from tests.support.faults import Scene
from tests.support.forked_workers import RUN_PEFTCHAT

PAGE = Path(__file__).resolve().parent.parent / "docs" / "faults.md"

STEPS = 16
TRAINING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "hang_timeout": 8}

INJECTED = """
import os, resource, sys, time
KIND, RANK, STEP = os.environ["FAULT"], os.environ.get("FAULT_RANK", "0"), int(os.environ.get("FAULT_STEP", "6"))
def patch(module):
    import torch
    real, calls = module.linear_cross_entropy, [0]
    def linear_cross_entropy(hidden, *arguments, **named):
        # The preflight checks come without gradients of a step.
        calls[0] += torch.is_grad_enabled()
        if torch.is_grad_enabled() and calls[0] >= STEP and os.environ.get("RANK", "0") == RANK:
            if KIND == "hang":
                time.sleep(1e6)
            if KIND == "error":
                raise ValueError("a defect in process " + RANK)
            if KIND == "nan":
                hidden = hidden * float("nan")
            if KIND == "clock" and calls[0] == STEP:
                now, clock = time.time, [0.0]
                time.time = lambda: now() + [86400.0, -86400.0][calls[0] % 2]
            if KIND == "memory" and len(hidden) > int(os.environ.get("FAULT_TARGETS", "0")):
                size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + 2**27, -1))
                try:
                    torch.empty(2**28)
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        return real(hidden, *arguments, **named)
    module.linear_cross_entropy = linear_cross_entropy
patch(sys.modules["peftchat.training.loss"])
"""
"""Runs inside the disturbed process, before peftchat."""


@dataclass
class Trial:
    """One fault, its run, and what became of both.

    Attributes:
        scene: the run.
        started: its process.
        said: what it wrote to standard error.
        status: its exit status.
    """

    scene: Scene
    started: Started | None = None
    said: str = ""
    status: int = 0

    def begin(self, *flags: object, kind: str = "", limit: int | None = None, **variables: str) -> Started:
        """Start the run, with a fault inside it."""
        environment = {**self.scene.environment, **variables, "FAULT": kind}
        arguments = [str(one) for one in ("train", self.scene.recipe, *flags)]
        injected = INJECTED if kind else ""
        if self.scene.sections["distributed"]["processes"] == 1:
            given = ["-c", injected + RUN_PEFTCHAT, "peftchat", *arguments]
        else:
            code = "from tests.support.forked_workers import launch_with_forks\n"
            given = ["-c", f"{code}launch_with_forks({arguments!r}, {injected!r})"]
        self.started = start(*given, cwd=self.scene.folder, environment=environment, file_size_limit=limit)
        return self.started

    def end(self, timeout: float = 900) -> None:
        """Wait for the run."""
        assert self.started is not None
        _, self.said = self.started.communicate(timeout=timeout)
        self.status = self.started.wait()

    def run(self, *flags: object, **named: Any) -> None:
        """Start the run and wait for it."""
        self.begin(*flags, **named)
        self.end()

    def until(self, ready: Callable[[], object], seconds: float = 900) -> None:
        """Wait for something to happen while the run goes on; on a busy machine it may take minutes to begin."""
        assert self.started is not None
        last = time.monotonic() + seconds
        while not ready() and self.started.poll() is None:
            if time.monotonic() > last:
                self.started.kill()
                raise SystemExit(f"nothing happened within {seconds:g} seconds: {self.so_far()}")
            time.sleep(0.002)

    def steps(self) -> int:
        """The steps that the run has logged."""
        metrics = self.scene.run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def workers(self) -> list[psutil.Process]:
        assert self.started is not None
        return psutil.Process(self.started.pid).children()

    def so_far(self) -> str:
        assert self.started is not None
        return Path(f"/proc/self/fd/{self.started.stderr.fileno()}").read_text()


@dataclass(frozen=True)
class Fault:
    """A fault that is injected.

    Attributes:
        name: what it is, for the table.
        inject: disturbs the run and waits for its end.
        sections: of the recipe.
        processes: of the run.
        same: whether the run has to end with the losses of an undisturbed one.
        disk: bytes of a disk of its own; None for none.
    """

    name: str
    inject: Callable[[Trial], None]
    sections: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    same: bool = True
    disk: int | None = None


def signaled(number: int, target: str = "launcher") -> Callable[[Trial], None]:
    """Send a signal after a few steps: to the command, to the second of its processes, or to all."""

    def inject(trial: Trial) -> None:
        process = trial.begin(PYTHONUNBUFFERED="1")
        trial.until(lambda: trial.steps() > 5)
        workers = trial.workers()
        targets = {"launcher": [psutil.Process(process.pid)], "worker": workers[1:], "all": workers}[target]
        for one in targets:
            one.send_signal(number)
        if number == getattr(signal, "SIGUSR2", None):
            trial.until(lambda: "as asked" in trial.so_far())
        trial.end()
        _, alive = psutil.wait_procs(workers, timeout=20)
        trial.said += f"\n{len(alive)} processes were left behind\n" if alive else ""

    return inject


def killed_in_a_save(trial: Trial) -> None:
    process = trial.begin()
    trial.until(lambda: (trial.scene.run / "checkpoints" / "checkpoint-8" / "saving.json").exists())
    process.kill()
    trial.end()


def second_run(trial: Trial) -> None:
    trial.begin()
    trial.until(lambda: trial.steps() > 1)
    other = Trial(trial.scene)
    other.run()
    trial.end()
    trial.said, trial.status = f"second run: {other.said}\nfirst run: finished", other.status


def damaged(trial: Trial) -> None:
    """Stop a run, fill a file of its newest checkpoint with zeros, and resume."""
    process = trial.begin()
    trial.until(lambda: trial.steps() > 9)
    process.send_signal(signal.SIGTERM)
    trial.end()
    newest = max(trial.scene.run.glob("checkpoints/*"), key=lambda one: int(one.name.rpartition("-")[2]))
    state = newest / "optimizer.pt"
    state.write_bytes(bytes(state.stat().st_size))
    trial.run("--resume")


def read_only(trial: Trial) -> None:
    trial.begin()
    trial.until(lambda: trial.steps() > 5)
    subprocess.run(["mount", "-o", "remount,ro", str(trial.scene.run.parent)], check=False, capture_output=True)
    trial.end()
    subprocess.run(["mount", "-o", "remount,rw", str(trial.scene.run.parent)], check=True)


def full_disk(trial: Trial) -> None:
    trial.begin()
    trial.until(lambda: trial.steps() > 5)
    filler = trial.scene.run.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    trial.end()
    filler.unlink()


def hanging(*, stopped: bool) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        process = trial.begin(**({} if stopped else {"kind": "hang"}), FAULT_RANK="1")
        if stopped:
            trial.until(lambda: trial.steps() > 3)
            trial.workers()[1].send_signal(signal.SIGSTOP)
        trial.until(lambda: "No progress for" in trial.so_far(), 90)
        # The first signal waits for the end of the step, and the second does not.
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
        trial.end()

    return inject


def inside(kind: str, *flags: object, **variables: str) -> Callable[[Trial], None]:
    return lambda trial: trial.run(*flags, kind=kind, **variables)


HALVE = {"training": {"on_oom": "halve"}}
BIG = 60 << 20

FAULTS = (
    Fault("SIGTERM", signaled(signal.SIGTERM)),
    Fault("SIGUSR1 (Slurm's warning), 2 processes", signaled(signal.SIGUSR1), processes=2),
    Fault("SIGUSR2: a checkpoint, please", signaled(signal.SIGUSR2)),
    Fault("Ctrl-C to one of 2 processes", signaled(signal.SIGINT, "worker"), processes=2),
    Fault("`kill -9` in a step", signaled(signal.SIGKILL)),
    Fault("`kill -9` in a save", killed_in_a_save),
    Fault("`kill -9` of the launcher of 2", signaled(signal.SIGKILL), processes=2),
    Fault("`kill -9` of one of 2 processes", signaled(signal.SIGKILL, "worker"), processes=2),
    Fault("an error in one of 2 processes", inside("error", FAULT_RANK="1"), processes=2),
    Fault("a hang in one of 2 processes", hanging(stopped=False), processes=2),
    Fault("one of 2 processes is stopped (SIGSTOP)", hanging(stopped=True), processes=2),
    Fault("memory runs out, `on_oom: stop`", inside("memory")),
    Fault("memory runs out, `on_oom: halve`", inside("memory", FAULT_TARGETS="40"), HALVE),
    Fault("memory runs out in one of 2 processes", inside("memory", FAULT_RANK="1"), processes=2),
    Fault("a hidden state that is not a number", inside("nan")),
    Fault("the clock jumps by a day, back and forth", inside("clock")),
    Fault("a file-size limit (`ulimit -f`)", lambda trial: trial.run(limit=100_000)),
    Fault("the disk fills up", full_disk, disk=BIG),
    Fault("the disk becomes read-only", read_only, disk=BIG),
    Fault("the newest checkpoint is filled with zeros", damaged),
    Fault("a second run into the folder", second_run),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults that contain this text")
    parser.add_argument("--json", type=Path, help="keep the rows here after each fault, and go on with them")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell has what it starts in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows: dict[str, str] = {}
    if chosen.json and chosen.json.is_file():
        rows = json.loads(chosen.json.read_text())
    with tempfile.TemporaryDirectory(prefix="peftchat-faults-") as name:
        folder = Path(name)
        expected = cache(lambda processes: losses(undisturbed(folder, processes)))
        for number, fault in enumerate(FAULTS):
            if chosen.only not in fault.name or fault.name in rows:
                continue
            rows[fault.name] = try_fault(folder / str(number), fault, expected(fault.processes))
            print(rows[fault.name], flush=True)
            if chosen.json:
                write_text(chosen.json, json.dumps(rows, indent=1))
    if chosen.write:
        write_table(PAGE, "bench_faults", f"\n\n{table(rows)}\n\n")


def table(rows: Mapping[str, str]) -> str:
    """Return the rows as a table in Markdown, and the faults that were not tried."""
    lines = [
        "| injected | what the user saw | status | left on disk | how it went on |",
        "| --- | --- | --- | --- | --- |",
        *(rows[fault.name] for fault in FAULTS if fault.name in rows),
    ]
    missing = [fault.name for fault in FAULTS if fault.name not in rows]
    if missing:
        lines += ["", f"Not run on this version: {'; '.join(missing)}."]
    return "\n".join(lines)


def undisturbed(folder: Path, processes: int) -> Scene:
    trial = Trial(scene(folder / f"undisturbed{processes}", {}, processes))
    trial.run()
    if trial.status:
        raise SystemExit(trial.said)
    return trial.scene


def scene(folder: Path, sections: Mapping[str, Any], processes: int) -> Scene:
    folder.mkdir()
    made = Scene.build(folder)
    write_small_talk(made.data, 48)
    made.sections = {
        "distributed": {"strategy": "single" if processes == 1 else "ddp", "processes": processes},
        "training": {**TRAINING, **sections.get("training", {})},
    }
    made.environment = {"PEFTCHAT_CACHE": str(folder.parent / "cache")}
    return made


def losses(done: Scene) -> list[Any]:
    return [(line["step"], line["loss"]) for line in read_json_lines(done.run / "metrics.jsonl") if "loss" in line]


def try_fault(folder: Path, fault: Fault, expected: list[Any]) -> str:
    """Inject a fault, resume the run, and return the row of the table."""
    made = scene(folder, fault.sections, fault.processes)
    with disk(folder / "disk", fault.disk) as place:
        if fault.disk is not None:
            made.run = place / "run"
        trial = Trial(made)
        fault.inject(trial)
        said, status, left = spoken(trial.said, folder), trial.status, on_disk(made.run)
        how = "it was finished"
        if not (made.run / "run.json").is_file():
            trial.run("--resume")
            how = (
                "`--resume` finished it"
                if trial.status == 0
                else f"status {trial.status}: {spoken(trial.said, folder)}"
            )
        if (made.run / "run.json").is_file():
            found = losses(made)
            worst = max((abs(a[1] - b[1]) / b[1] for a, b in zip(found, expected, strict=True)), default=0.0)
            how += ", all losses equal" if found == expected else f", losses equal to {worst:.0e}"
    return f"| {fault.name} | {said} | {status} | {left} | {how} |"


@contextlib.contextmanager
def disk(place: Path, size: int | None) -> Iterator[Path]:
    """Mount a disk of so many bytes."""
    if size is None:
        yield place
        return
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


_PROGRESS = ("step ", "Loading weights", "Writing model", "Chosen:", "note:", "There were no", "improved", "DeepSpeed")


def spoken(stderr: str, folder: Path) -> str:
    """Return what a command said at its end, as a cell of a table: without progress, places and process numbers."""
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip() and not line.startswith(_PROGRESS)]
    table = next((number for number, line in enumerate(lines) if line.startswith("training loss")), len(lines))
    lines = [line for line in lines[:table] if not line.startswith("    ")]
    frames = [line for line in lines if line.startswith("  File ")]
    lines = [line for line in lines if line not in frames[:-1]]
    text = " ".join(" ".join(lines).split()).replace(str(folder), "").replace("|", "\\|")
    text = re.sub(r"/\S*/site-packages/|/tmp/\S*?/(?=injected)", "…/", text)
    text = re.sub(r"(pid|Process) \d+ on [\w.-]+", r"\1 4321 on host", text)
    text = re.sub(r"(process|-CONT|kill) \d{3,}", r"\1 4321", text)
    return f"`{text}`" if text else "nothing"


def on_disk(run: Path) -> str:
    """Return the checkpoints of a run folder, and what else tells its state."""
    if not run.exists():
        return "no run folder"
    found = sorted(run.glob("checkpoints/*"), key=lambda one: (len(one.name), one.name))
    names = [one.name + ("" if (one / "complete.json").is_file() else " (incomplete)") for one in found]
    if (run / "run.json").is_file():
        names.append("the finished model")
    return ", ".join(names) or "no checkpoint"


if __name__ == "__main__":
    main()
