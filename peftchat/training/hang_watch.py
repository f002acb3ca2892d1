"""Hang watch: a run that stands still says which process is stuck, in which step, with what and where in the code.

Each process has a thread that looks at the process's position now and then, and writes it to a file of the run folder
(`.heartbeats/rank-N.json`). So a process that is stopped, or whose machine is gone, is seen too: its file no longer
changes. Where nothing moves, the first process that still lives writes one report for all.

Time is counted in the looks of that thread, so a clock that jumps, a suspended machine or a stopped job (Ctrl-Z) is no
hang. The thread cannot look while a library holds Python's lock; other processes then see that the file no longer
changes.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from peftchat.files import write_text
from peftchat.training.position import Position, RunPosition
from peftchat.training.step_numbers import name_sources

if TYPE_CHECKING:
    from types import FrameType

FOLDER = ".heartbeats"

_LOOKS = 20
"""How often a thread looks within the limit."""

_LONGEST_LOOK = 2.0
_SHORTEST_LOOK = 0.05

_SLOW = 20
"""So many limits pass before a position counts as stuck that has no usual time: a first step, an evaluation, a save."""

_USUAL = 5
"""A step of a slow model counts as stuck after so many times the longest one."""

_LOST_LOOKS = 4
"""Looks without a change of its file after which another process shows no sign of life."""

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "accelerate/utils/operations")
_COMPILERS = ("torch/_dynamo/", "torch/_inductor/", "torch/utils/cpp_extension", "triton/compiler/")

_WRAPPER = "torch/nn/modules/module.py"
"""Two calls of it lie between those of any two modules, and say nothing."""

_FRAMES = 12
"""Innermost calls that are shown."""

_SOURCES = 8
"""Conversations that are kept in a file."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a process shows of itself.

    Attributes:
        rank: of the process.
        pid: its process id.
        host: its machine.
        beat: how often its thread has looked.
        count: the number of its position; the process with the smallest is behind the others.
        doing: the position, in words.
        sources: conversations that it works on.
        idle: seconds since its last position.
        waits: whether the training thread is in a function that waits for other processes.
        stack: the innermost calls of the training thread; empty until nothing moves.
    """

    rank: int
    pid: int
    host: str
    beat: int
    count: int
    doing: str
    sources: Sequence[str] = ()
    idle: float = 0.0
    waits: bool = False
    stack: str = ""

    @classmethod
    def read(cls, file: Path) -> "Heartbeat | None":
        """Read a process's file; None where it is missing or of another version."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def name(self) -> str:
        """The process, as a user finds it."""
        return f"process {self.rank} (pid {self.pid} on {self.host})"


class HangWatch:
    """Watches a process from a thread of its own.

    Args:
        position: of the process.
        folder: the run folder.
        limit: seconds without a new position that count as a hang; 0 watches nothing.
        rank: of the process.
        processes: of the run.
        sources: names the conversations of a position.
        tell: called with the report.
    """

    def __init__(
        self,
        position: RunPosition,
        folder: Path,
        limit: float,
        *,
        rank: int,
        processes: int,
        sources: Callable[[Position], list[str]],
        tell: Callable[[str], None],
    ) -> None:
        self._position = position
        self._run_folder = folder
        self._folder = folder / FOLDER
        self._limit = limit
        self._look = min(_LONGEST_LOOK, max(_SHORTEST_LOOK, limit / _LOOKS))
        self._rank = rank
        self._processes = processes
        self._sources = sources
        self._tell = tell
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        self._beat = 0
        self._seen = -1
        self._idle_looks = 0
        self._longest = 0.0
        self._was_steady = False
        self._has_told, self._has_dumped = False, False
        self._named: list[str] = []
        self._others: dict[int, tuple[int, int]] = {}

    def start(self) -> None:
        """Begin; the run folder exists where this process can see it."""
        if self._limit > 0:
            self._thread.start()

    def stop(self) -> None:
        """End, and remove this process's file."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        with contextlib.suppress(OSError):
            for file in self._folder.glob(f"rank-{self._rank}.*"):
                file.unlink()
            self._folder.rmdir()

    def _run(self) -> None:
        while not self._end.wait(self._look):
            # Whatever goes wrong here, such as a full disk, must not touch the run.
            with contextlib.suppress(Exception):
                self._look_once()

    def _look_once(self) -> None:
        now = self._position.now
        self._beat += 1
        if now.count != self._seen:
            self._moved(now)
        else:
            self._idle_looks += 1
        idle = self._idle_looks * self._look
        limit = self._limit_of(now)
        frames = _stack_of(self._main) if idle >= self._limit / 2 else []
        if _is_in(frames, _COMPILERS):
            self._idle_looks = 0
            return
        own = Heartbeat(
            self._rank, os.getpid(), socket.gethostname(), self._beat, now.count, str(now), self._named, idle,
            _is_in(frames, _COLLECTIVES), _as_text(frames),
        )  # fmt: skip
        self._write(own)
        if idle < limit / 2:
            self._others = {}
            return
        lost = self._watch_others(idle_enough=idle >= limit)
        if idle < limit or self._has_told:
            return
        if not self._has_dumped:
            self._has_dumped = True
            self._dump()
        if self._rank == min({*range(self._processes)} - lost):
            self._has_told = True
            self._tell(describe([own, *self._read_others()], lost, idle))

    def _moved(self, now: Position) -> None:
        """Take over a new position."""
        if self._has_told:
            self._tell(f"The run goes on, after about {self._idle_looks * self._look:.0f} s.")
            self._has_told = False
        elif self._was_steady and not self._has_dumped:
            self._longest = max(self._longest, self._idle_looks * self._look)
        self._has_dumped = False
        self._seen, self._idle_looks, self._was_steady = now.count, 0, now.is_steady
        self._named = self._sources(replace(now, examples=now.examples[:_SOURCES]))

    def _limit_of(self, now: Position) -> float:
        """Return the seconds that a position may take."""
        if not now.is_steady:
            return _SLOW * self._limit
        return max(self._limit, _USUAL * self._longest)

    def _write(self, own: Heartbeat) -> None:
        # Without a folder that all see, each process has itself alone.
        if self._run_folder.is_dir():
            self._folder.mkdir(exist_ok=True)
            write_text(self._folder / f"rank-{self._rank}.json", json.dumps(asdict(own)), sync=False)

    def _read_others(self) -> list[Heartbeat]:
        found = [Heartbeat.read(self._folder / f"rank-{one}.json") for one in range(self._processes)]
        return [one for one in found if one is not None and one.rank != self._rank]

    def _watch_others(self, *, idle_enough: bool) -> set[int]:
        """Return the ranks whose files no longer change, or do not exist."""
        present = {one.rank: one.beat for one in self._read_others()}
        for rank, beat in present.items():
            before, looks = self._others.get(rank, (beat, 0))
            self._others[rank] = (beat, looks + 1 if before == beat else 0)
        lost = {rank for rank, (_, looks) in self._others.items() if looks >= _LOST_LOOKS}
        return lost | ({*range(self._processes)} - present.keys() - {self._rank} if idle_enough else set())

    def _dump(self) -> None:
        """Leave the stacks of all threads in the run folder."""
        with contextlib.suppress(OSError), (self._folder / f"rank-{self._rank}.stacks").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


def describe(found: Sequence[Heartbeat], lost: set[int], idle: float) -> str:
    """Return the report of a run in which nothing moves.

    Args:
        found: what each process has last shown of itself.
        lost: ranks that show no sign of life.
        idle: seconds since something moved in the process that reports.
    """
    found = sorted(found, key=lambda one: one.rank)
    stuck = [one for one in found if one.rank in lost]
    if not stuck:
        behind = min(one.count for one in found)
        slowest = [one for one in found if one.count == behind]
        # Those that wait for each other are not stuck by themselves.
        stuck = [one for one in slowest if not one.waits] or slowest
    lines = [f"No progress for {idle:.0f} s."]
    for one in stuck:
        is_lost = one.rank in lost
        life = f" It shows no sign of life: {_state(one)}." if is_lost else ""
        verb = "was last seen" if is_lost else "is stuck"
        lines.append(f"{one.name[0].upper()}{one.name[1:]} {verb} in {one.doing}, with {_named(one)}.{life}")
        if one.stack:
            lines.append(one.stack.rstrip("\n"))
    unknown = sorted(lost - {one.rank for one in found})
    if unknown:
        lines.append(f"Of process {', '.join(map(str, unknown))} nothing is known here: it may be on another machine.")
    waiting = [one for one in found if one not in stuck]
    lines += [f"{one.name[0].upper()}{one.name[1:]} waits in {one.doing}." for one in waiting]
    lines.append(
        "The run waits on. To end it, stop it twice (Ctrl-C or SIGTERM), then add `--resume`. "
        "training.hang_timeout sets the seconds until this report."
    )
    return "\n".join(lines)


def _named(one: Heartbeat) -> str:
    return name_sources(one.sources) if one.sources else "no conversation"


def _state(one: Heartbeat) -> str:
    """Return what the system says about a process."""
    if one.host != socket.gethostname():
        return f"look for it on {one.host}"
    try:
        status = psutil.Process(one.pid).status()
    except psutil.Error:
        return "it has ended"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return f"it is stopped, and `kill -CONT {one.pid}` continues it"
    if status == psutil.STATUS_DISK_SLEEP:
        return "it waits for a disk or a network file system"
    return f"the system calls it {status}"


def _stack_of(thread: int) -> list[traceback.FrameSummary]:
    """Return the calls of a thread, the innermost last."""
    frame: FrameType | None = sys._current_frames().get(thread)
    return [] if frame is None else list(traceback.extract_stack(frame))


def _is_in(frames: Sequence[traceback.FrameSummary], places: Sequence[str]) -> bool:
    return any(place in one.filename.replace(os.sep, "/") for one in frames[-_FRAMES:] for place in places)


def _as_text(frames: Sequence[traceback.FrameSummary]) -> str:
    told = [one for one in frames if not one.filename.replace(os.sep, "/").endswith(_WRAPPER)]
    return "".join(traceback.format_list(told[-_FRAMES:]))
