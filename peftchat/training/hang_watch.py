"""The hang watch: a process without progress is reported with its step, its conversations and its stack.

A thread of each process notes when the training loop last went on, and publishes it in the store of the process group
through a connection of its own. Where nothing goes on, the first process that can still speak reads what all published,
and prints one report. Nothing is ended: where the wait is endless, the limit of the process group does that.
"""

import gc
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftchat.console import stderr
from peftchat.formatting import format_duration
from peftchat.training.position import Position

if TYPE_CHECKING:
    from peftchat.training.context import TrainContext
    from peftchat.training.trainer import ChatTrainer

_SLOWER = 10.0
"""A wait of as many times the longest one so far is none of the usual ones."""

_RARE_SECONDS = 600.0
"""The least limit of what a run does rarely: its first steps, which may compile, evaluations and checkpoints."""

_USUAL_STEPS = 2
"""Steps before waits are usual."""

_CHECKS_PER_LIMIT = 12
_LONGEST_PAUSE = 5.0
_FRAMES = 12
_WAITING = (
    "torch/distributed/", "torch/nn/parallel/", "deepspeed/comm/", "torch/autograd/graph.py", "torch/cuda/",
)  # fmt: skip
"""Where a process waits for another one or for its GPU: collectives, the backward pass, synchronization."""

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

_COMPILERS = ("torch/_dynamo/convert_frame", "torch/_inductor/", "torch/utils/cpp_extension", "triton/compiler/")


def frame_of(thread: int) -> FrameType | None:
    """Return the frame that a thread executes.

    While Python lists the frames, it holds a lock that the start of a thread needs. Garbage collected in between can be
    a tensor, which waits for the thread that starts one: https://github.com/python/cpython/issues/106883
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(thread)
    finally:
        if was_enabled:
            gc.enable()


class Store(Protocol):
    """What is used of the process group's store."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def check(self, keys: list[str]) -> bool:
        """Return whether the keys are there."""

    def get(self, key: str) -> bytes:
        """Return a value, and wait for it."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What a process says of itself.

    Attributes:
        rank: its number.
        step: the optimizer step that it is in, or after.
        doing: what it does.
        still: seconds since it went on.
        waits: whether its innermost place is one where processes wait for others.
        place: that place.
        conversations: those of its current micro-batch, named by `file:line`.
        stack: its innermost frames, if it did not go on.
        beat: how often it has said so. Clocks of several machines differ, and any clock may jump.
        pid: its process id.
        host: its machine.
        has_left: whether its training loop has ended, perhaps by an error that it will tell.
    """

    rank: int
    step: int
    doing: str
    still: float
    waits: bool
    place: str
    conversations: str
    stack: str
    beat: int
    pid: int = 0
    host: str = ""
    has_left: bool = False


class HangWatch(TrainerCallback):
    """Reports a process that does not go on.

    Args:
        limit: seconds without progress in a step; ten times the longest wait so far, if that is more.
        conversations: names the conversations of this process's current micro-batch.
        rank: this process.
        processes: how many there are.
        store: where they publish; None for one process.
        tell: prints a report.
    """

    def __init__(
        self,
        limit: float,
        conversations: Callable[[], str],
        rank: int = 0,
        processes: int = 1,
        store: Store | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._limit = limit
        self._conversations = conversations
        self._rank, self._processes, self._store = rank, processes, store
        self._tell = tell or _print
        self._pause = min(_LONGEST_PAUSE, limit / _CHECKS_PER_LIMIT)
        self._thread_id = threading.get_ident()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._step, self._doing, self._went_on = 1, "before step", time.monotonic()
        self._steps_seen = 0
        self._beat = 0
        self._longest: dict[str, float] = {}
        # When the loop had last gone on before the last report, and for how long it had then stood still.
        self._reported = (0.0, 0.0)

    def begin(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._pause + 1)
        self._publish(replace(self._sign(0.0, with_stack=False), has_left=True))

    def go_on(self, step: int, doing: str) -> None:
        """Note that the training loop goes on with something else."""
        now = time.monotonic()
        before, self._went_on = self._went_on, now
        waited = now - before
        self._longest[self._doing] = max(waited, self._longest.get(self._doing, 0.0))
        self._step, self._doing = step, doing
        if self._reported[0] == before:
            self._tell(f"Step {step}: it goes on after {format_duration(waited)}.")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start watching."""
        self.go_on(1, "before step")
        self.begin()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the begin of a step."""
        self.go_on(state.global_step + 1, "in step")

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the end of a micro-batch."""
        self.go_on(state.global_step + 1, "in step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the end of a step; the next batch, an evaluation or a checkpoint follows."""
        self._steps_seen += 1
        self.go_on(state.global_step, "after step")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note a batch of an evaluation."""
        self.go_on(state.global_step, "in the evaluation of step")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the end of an evaluation."""
        self.go_on(state.global_step, "after step")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the end of a checkpoint."""
        self.go_on(state.global_step, "after step")

    def allowed(self) -> float:
        """Return the seconds that this process may stand still now."""
        is_rare = self._steps_seen < _USUAL_STEPS or self._doing != "in step"
        least = max(_RARE_SECONDS, self._limit) if is_rare else self._limit
        return max(least, _SLOWER * self._longest.get(self._doing, 0.0))

    def _watch(self) -> None:
        looked = time.monotonic()
        self._publish(self._sign(0.0, with_stack=False))  # The others know this process from the beginning.
        while not self._ended.wait(self._pause):
            before, looked = looked, time.monotonic()
            if looked - before > 3 * self._pause + 1:
                # The process itself was stopped (Ctrl-Z, a debugger), or the machine slept: nothing hung.
                self._went_on += looked - before
            went_on = self._went_on
            still = time.monotonic() - went_on
            self._beat += 1
            is_late = self._is_late(still)
            sign = self._sign(still, with_stack=is_late)
            if not self._publish(sign):
                return
            is_told = self._reported[0] == went_on and still < 10 * self._reported[1]
            if is_late and not is_told:
                heard = {sign.rank: sign.beat for sign in self._others()}
                # Others may be a moment behind with what they say, and those that live say something new.
                for _ in range(3 if self._processes > 1 else 0):
                    self._ended.wait(self._pause)
                    self._beat += 1
                    self._publish(replace(sign, beat=self._beat))
                looked = time.monotonic()
                self._report(sign, heard)
                self._reported = (went_on, still)

    def _publish(self, sign: Sign) -> bool:
        """Publish what this process says; return whether there is anybody left."""
        try:
            if self._store is not None:
                self._store.set(_key(self._rank), json.dumps(asdict(sign)))
        except RuntimeError:
            return False  # The process that holds the store has gone; the others end too.
        return True

    def _sign(self, still: float, *, with_stack: bool) -> Sign:
        frame = frame_of(self._thread_id)
        place = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        return Sign(
            self._rank,
            self._step,
            self._doing,
            still,
            any(part in place.replace("\\", "/") for part in _WAITING),
            place,
            self._conversations(),
            _stack(frame) if with_stack else "",
            self._beat,
            os.getpid(),
            socket.gethostname(),
        )

    def _compiles(self) -> bool:
        """Return whether the training loop waits for a compiler, which a new shape may call at any step."""
        frame = frame_of(self._thread_id)
        while frame is not None:
            if any(part in frame.f_code.co_filename.replace("\\", "/") for part in _COMPILERS):
                return True
            frame = frame.f_back
        return False

    def _is_late(self, still: float) -> bool:
        if still <= self._limit or self._compiles():
            return False
        others = self._others()
        if any(sign.has_left for sign in others) and still < _RARE_SECONDS:
            return False  # It will say what has ended it.
        # No usual wait explains a process that was stopped or has ended.
        return still > self.allowed() or any(_status(sign) in (*_STOPPED, *_ENDED) for sign in others)

    def _others(self) -> list[Sign]:
        """Return what each other process has said last."""
        signs = [self._read(rank) for rank in range(self._processes) if rank != self._rank]
        return [sign for sign in signs if sign is not None]

    def _report(self, own: Sign, heard: Mapping[int, int]) -> None:
        if self._store is None:
            self._tell(report([own], []))
            return
        signs, silent = [own], []
        for rank in (rank for rank in range(self._processes) if rank != self._rank):
            sign = self._read(rank)
            if sign is None or heard.get(rank) == sign.beat:
                silent.append((rank, sign))
            else:
                signs.append(sign)
        if min(sign.rank for sign in signs) == self._rank:
            self._tell(report(signs, silent))

    def _read(self, rank: int) -> Sign | None:
        if self._store is None:
            return None
        try:
            # A key that is not there would be waited for.
            if not self._store.check([_key(rank)]):
                return None
            return Sign(**json.loads(self._store.get(_key(rank))))
        except (RuntimeError, ValueError, TypeError):
            return None


def report(signs: Sequence[Sign], silent: Sequence[tuple[int, Sign | None]]) -> str:
    """Return the report of a hang.

    Args:
        signs: of the processes that speak.
        silent: numbers and last signs of those that do not.
    """
    first = max(signs, key=lambda sign: sign.still)
    lines = [f"No progress for {format_duration(first.still)} {first.doing} {first.step}."]
    if not signs[1:] and not silent:
        return "\n".join([*lines, *_whereabouts(first)])
    for rank, sign in silent:
        if sign is None:
            lines.append(f"Rank {rank} has given no sign of life ever: it hangs in native code, or is stopped.")
            continue
        lines.append(
            f"Rank {rank} gives no sign of life; the last was {sign.doing} {sign.step}. Process {sign.pid} on "
            f"{sign.host} {_state(sign)}."
        )
        lines += _whereabouts(sign)
    at_work = [sign for sign in signs if not sign.waits]
    for sign in at_work:
        stands = f"Rank {sign.rank} has stood still for {format_duration(sign.still)} {sign.doing} {sign.step}."
        lines += [stands, *_whereabouts(sign)]
    waiting = [sign for sign in signs if sign.waits]
    if waiting:
        ranks = ", ".join(str(sign.rank) for sign in waiting)
        lines.append(f"Ranks that wait in a collective, the backward pass or for a GPU: {ranks}.")
    if waiting and not at_work and not silent:
        for sign in waiting:
            lines += [f"Rank {sign.rank}:", *_whereabouts(sign)]
    return "\n".join(lines)


def _status(sign: Sign) -> str:
    """Return psutil's status of a process, on another machine an empty text."""
    if sign.host != socket.gethostname():
        return ""
    try:
        return str(psutil.Process(sign.pid).status())
    except psutil.Error:
        return str(psutil.STATUS_DEAD)


def _state(sign: Sign) -> str:
    """Return what the system says about a process that is silent."""
    status = _status(sign)
    if not status:
        return "hangs in native code, is stopped, or has gone"
    if status in _ENDED:
        return "has ended"
    if status in _STOPPED:
        return f"is stopped; `kill -CONT {sign.pid}` lets it go on"
    if status == psutil.STATUS_DISK_SLEEP:
        return "waits for a disk or a network file system"
    return f"hangs in native code (the system calls it {status})"


def _whereabouts(sign: Sign) -> list[str]:
    lines = []
    if sign.conversations:
        lines.append(f"Its micro-batch has {sign.conversations}")
    if sign.stack:
        lines.append(f"Its innermost calls:\n{sign.stack.rstrip()}")
    return lines


def _stack(frame: FrameType | None) -> str:
    return "" if frame is None else "".join(traceback.format_stack(frame)[-_FRAMES:])


def _key(rank: int) -> str:
    return f"peftchat/hang_watch/{rank}"


def _print(text: str) -> None:
    stderr.print(text, style="yellow", markup=False, highlight=False)


def _own_connection() -> Store | None:
    """Return a connection of its own to the process group's store; None for one process."""
    if not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    # The main thread may wait in the store's own connection.
    store: Any = dist.distributed_c10d._get_default_store()
    own: Store = store.clone()
    return own


def watch_hangs(trainer: "ChatTrainer", context: "TrainContext") -> HangWatch | None:
    """Have a run watched, if its recipe does not say otherwise."""
    limit = context.recipe.training.hang_timeout
    if limit is None:
        return None

    def conversations() -> str:
        # Those of the last micro-batch, also while the process waits for the next one.
        return context.name_sources(Position(examples=trainer.current_examples))

    watch = HangWatch(limit, conversations, trainer.args.process_index, trainer.args.world_size, _own_connection())
    trainer.add_callback(watch)
    return watch
