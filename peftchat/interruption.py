"""Interruption: a signal ends a command in one line, with 128 plus its number as the exit status."""

import contextlib
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

ENDING = tuple(
    signal.Signals[name]
    # Schedulers send the last three as a warning before they kill. `train` takes SIGUSR2 for a request (`CHECKPOINT`).
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if name in signal.Signals.__members__
)

_ONE_PRESS_SECONDS = 0.5
"""`timeout`, torchrun and Slurm send a signal to a process and to its group: within this time it is one signal."""

_LEAVE_SECONDS = 5.0
"""Threads and libraries that have not ended this long after an interruption are left behind."""


_NAMED = re.compile(r"^\s*(?:Interrupted: Stopped by (SIG[A-Z0-9]+)\.|KeyboardInterrupt\b)", re.MULTILINE)


class Interrupted(BaseException):
    """A signal asked the process to end. No library takes it for an error of its own.

    Args:
        number: the signal.
        message: the line to say instead of the signal's name.
    """

    def __init__(self, number: int, message: str | None = None) -> None:
        self.number = number
        self.message = message or ("Interrupted." if number == signal.SIGINT else f"Stopped by {signal_name(number)}.")
        super().__init__(self.message)

    @property
    def status(self) -> int:
        """The exit status, as a shell counts it."""
        return 128 + self.number


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGTERM; Ctrl-C for that of the keyboard."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` for a signal that would end the process, and `KeyboardInterrupt` for Ctrl-C as usual.

    A signal that is ignored stays so: `nohup` has a command survive its terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    usual = {number: handler for number, handler in before.items() if handler in _USUAL_HANDLERS}
    hook = sys.unraisablehook
    for number in usual:
        signal.signal(number, _interrupt if number == signal.SIGINT else _Raise())
    sys.unraisablehook = _end_on_swallowed
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in usual.items():
            signal.signal(number, handler)


_USUAL_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, or end the process where a library could swallow it."""
    if _is_importing(frame):
        _end_now(Interrupted(number))
    signal.default_int_handler(number, frame)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a command is importing what it needs, and has done nothing yet.

    Libraries catch every exception around some of their imports, and go on without the module.
    """
    importer: FrameType | None = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    name = "" if importer is None else importer.f_globals.get("__name__", "")
    return name in ("peftchat.api", "peftchat.before_training") or name.startswith("peftchat.cli.")


class _Raise:
    """A signal handler that raises once; the second signal ends the process at once."""

    raised: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        _leave_dead_terminal()
        if _is_importing(frame):
            _end_now(Interrupted(number))
        if self.raised is None:
            self.raised = now
            raise Interrupted(number)
        if now - self.raised > _ONE_PRESS_SECONDS:
            _end_now(Interrupted(number))


def interruption(error: BaseException) -> Interrupted | None:
    """Return the interruption that an exception is, or that it was raised from or during.

    Libraries wrap it: an extension module that is interrupted while it is imported raises an `ImportError`.
    """
    seen: set[int] = set()
    # The end of a command that has spoken already is none.
    found: BaseException | None = None if isinstance(error, SystemExit) else error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, Interrupted):
            return found
        if isinstance(found, KeyboardInterrupt):
            return Interrupted(signal.SIGINT)
        # An extension module may keep the words of what interrupted it alone, as pydantic does in a class body.
        named = _NAMED.search(str(found))
        if named is not None:
            return Interrupted(signal.Signals[named[1] or "SIGINT"])
        found = found.__cause__ or found.__context__
    return None


def end(interrupted: Interrupted) -> NoReturn:
    """Say the line, in the first of several processes, and end the process within seconds."""
    for number in (signal.SIGINT, *ENDING):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN)
    _say(interrupted)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(interrupted.status)
    timer = threading.Timer(_LEAVE_SECONDS, os._exit, [interrupted.status])
    timer.daemon = True
    timer.start()
    sys.exit(interrupted.status)


def leave(status: int) -> NoReturn:
    """End the process with a status; one of several processes at once.

    What is left of a process group waits for processes that have gone, or complains about them.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_now(None, status)
    sys.exit(status)


class SignalRequest:
    """A signal that asks for something and ends nothing: it is noted, and answered where there is time for it.

    Args:
        name: the signal's name; a platform may lack it, and then nobody asks.

    Attributes:
        number: the signal, or None.
        hand_on: called when the signal comes, in a process that only hands it on.
    """

    def __init__(self, name: str) -> None:
        self.number: int | None = getattr(signal, name, None)
        self.hand_on: Callable[[], None] | None = None
        self._came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        self._came = True
        if self.hand_on is not None:
            self.hand_on()

    def begin(self) -> None:
        """Take the signal from now on, and one that has waited for it (`blocked`).

        A program that has a handler of its own keeps it, and an ignored signal stays ignored.
        """
        if self.number is not None and threading.current_thread() is threading.main_thread():
            before = signal.getsignal(self.number)
            if before is signal.SIG_DFL or isinstance(before, _Raise):
                signal.signal(self.number, self)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [self.number])

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Have processes that are started in the block keep the signal until they `begin`.

        Without it the signal would end a process that is still importing.
        """
        if self.number is None:
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [self.number])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def take(self) -> bool:
        """Return whether the signal came since the last call."""
        came, self._came = self._came, False
        return came


CHECKPOINT = SignalRequest("SIGUSR2")
"""Asks a run for a checkpoint after its current step."""


class DeferredSignals:
    """Notes the first signal, and hands a second one to the handler that was there before.

    Attributes:
        number: the signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        """Take the signals over; outside the main thread, which alone gets signals, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, *ENDING):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None) and not isinstance(handler, SignalRequest):
                self._before[number] = handler
                signal.signal(number, self._note)

    def end(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        _leave_dead_terminal()
        if self.number is None:
            self.number, self._noted_at = number, now
        elif now - self._noted_at > _ONE_PRESS_SECONDS:
            self.again(number)

    def again(self, number: int) -> None:
        """React to a second signal: interrupt what is on.

        Raises:
            Interrupted: always.
        """
        raise Interrupted(number)


def _leave_dead_terminal() -> None:
    """Write to nowhere from now on where the terminal has gone, which would make every line an error."""
    for descriptor in (1, 2):
        try:
            # A file or a pipe has no terminal to lose; a dead terminal is none any more.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _end_on_swallowed(unraisable: "sys.UnraisableHookArgs") -> None:
    """End the process where an interruption hit code that cannot raise, such as a finalizer."""
    error = unraisable.exc_value
    interrupted = interruption(error) if error is not None else None
    if interrupted is None:
        sys.__unraisablehook__(unraisable)
        return
    _end_now(interrupted)


def _end_now(interrupted: Interrupted | None, status: int = 1) -> NoReturn:
    if interrupted is not None:
        _say(interrupted)
        status = interrupted.status
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _say(interrupted: Interrupted) -> None:
    # The first of several processes speaks for all.
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(Exception):
            sys.stderr.write(f"{interrupted.message}\n")
            sys.stderr.flush()
