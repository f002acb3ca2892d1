"""Claim of a folder: one process owns it, survives no crash longer than it must, and is told by name.

The claim is a small file. It appears complete or not at all, so of two processes that start at once exactly one gets
it. It names its holder; a process that finds it decides whether the holder still lives:

- On the same machine, by the process's number and start time. That is exact, and a dead holder is replaced at once.
- On another machine (or in another container), by the heartbeat: the holder touches the file every `HEARTBEAT_SECONDS`.
  If it was touched lately, this process waits for the next touch; a holder that is silent for `SILENCE_SECONDS` is
  taken for dead. Only times of the file server are compared, and no lock of the file system is needed.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from peftchat.console import stderr
from peftchat.errors import UserError, VerificationError

CLAIM = ".claim"
"""The file's name. Names that begin with it belong to claims too."""

HEARTBEAT_SECONDS = 15.0
SILENCE_SECONDS = 120.0
"""Longer than network file systems keep the attributes of a file in their cache (NFS: 60 seconds)."""

_VARIABLE = "PEFTCHAT_CLAIM"
"""Environment variable with the claims that this process, or the launcher that started it, holds."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a claim.

    Attributes:
        token: the claim's own name; no two claims share one.
        host: the machine's name.
        machine: what tells machines and containers of one name apart.
        pid: process id.
        process_started: start of the process, in ticks of the machine; a number that is used again differs in it.
        started: when the folder was claimed, for people.
        command: the command line, for people.
    """

    token: str
    host: str
    machine: str
    pid: int
    process_started: float
    started: str
    command: str

    @classmethod
    def this_process(cls) -> "Holder":
        """Return a new claim of this process."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_started=_process_start(os.getpid()) or 0.0,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            command=" ".join(sys.argv)[:500],
        )

    @property
    def is_here(self) -> bool:
        """Whether the holder's process ids are those of this machine."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def has_ended(self) -> bool:
        """Return whether a process of this machine has ended."""
        # Not by signal 0, which Windows takes for Ctrl-C.
        if not psutil.pid_exists(self.pid):
            return True
        start = _process_start(self.pid)
        return start is None or start != self.process_started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


@contextlib.contextmanager
def claimed(folder: Path, *, option: str) -> Iterator[Callable[[], None]]:
    """Claim a folder, which is created, until the end of the block.

    The claim also covers processes that this one starts, and blocks inside this one. At the end the claim is removed,
    and so are the folders that were created for it and are empty.

    Args:
        folder: the folder.
        option: how messages name the folder's option, such as `output_dir`.

    Yields:
        A function that raises VerificationError if another process has taken the folder meanwhile.

    Raises:
        UserError: a live process holds the folder, or the claim cannot be written.
    """
    file = folder.absolute() / CLAIM
    where = f"{option}: {folder}"
    mine = Holder.this_process()
    created: list[Path] = []
    try:
        found = _read(file)
        is_nested = found is not None and _is_held_here(found)
        if not is_nested:
            created = _make_folder(file.parent)
            _acquire(file, mine, where)
            _remove_leftovers(file)
    except OSError as error:
        raise UserError(f"the folder cannot be written: {error.strerror or error}", where=where) from error
    if is_nested:
        yield lambda: None
        return
    heartbeat = _Heartbeat(file, mine)
    outer = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = ",".join(filter(None, (outer, mine.token)))
    try:
        heartbeat.start()
        yield lambda: heartbeat.check(where)
    finally:
        heartbeat.stop()
        _forget(mine.token)
        if (held := _read(file)) is not None and held.token == mine.token:
            with contextlib.suppress(OSError):
                file.unlink()
        _remove_empty(created)


def refuse_held(folder: Path, *, option: str) -> None:
    """Raise if another process holds the folder; the arguments are those of `claimed`.

    Raises:
        UserError: a live process holds the folder.
    """
    file = folder.absolute() / CLAIM
    where = f"{option}: {folder}"
    try:
        found = _read(file)
        if found is not None and not _is_held_here(found):
            _refuse_live(file, found, where)
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror or error}", where=where) from error


def _is_held_here(holder: Holder) -> bool:
    """Return whether this process, or the launcher that started it, holds a claim."""
    return holder.token in os.environ.get(_VARIABLE, "").split(",")


def is_claim(path: Path) -> bool:
    """Return whether a file belongs to a claim."""
    return path.name.startswith(CLAIM)


def _acquire(file: Path, mine: Holder, where: str) -> None:
    """Write the claim, or replace that of a dead holder.

    Only one process may replace a claim: the one that holds a second claim, named after the dead one. It looks again
    under that second claim, because the first may have changed hands since.
    """
    while not _create(file, mine):
        holder = _read(file)
        if holder is None:
            continue
        _refuse_live(file, holder, where)
        succession = file.with_name(f"{file.name}.{holder.token}")
        _acquire(succession, mine, where)
        try:
            present = _read(file)
            if present is not None and present.token == holder.token:
                _replace(file, mine)
                return
        finally:
            succession.unlink(missing_ok=True)


def _refuse_live(file: Path, holder: Holder, where: str) -> None:
    """Raise if the holder lives; return once it is surely dead."""
    if holder.is_here:
        if holder.has_ended():
            return
        raise _in_use(holder, where, "")
    first = _touched(file)
    told = False
    while first is not None and (silence := _server_time(file.parent) - first) < SILENCE_SECONDS:
        if not told and silence < SILENCE_SECONDS - HEARTBEAT_SECONDS:
            stderr.print(
                f"{file.parent} belongs to {holder}. Waiting up to {SILENCE_SECONDS - silence:.0f} s to see whether "
                "that process still lives.",
                markup=False,
                highlight=False,
            )
            told = True
        time.sleep(min(1.0, SILENCE_SECONDS / 20))
        now = _touched(file)
        if now is None:
            return
        if now != first:
            raise _in_use(holder, where, ", which has just shown that it lives")


def _in_use(holder: Holder, where: str, sign: str) -> UserError:
    return UserError(
        f"another run is writing to this folder: {holder}{sign}",
        where=where,
        hint=f"Wait until it ends, end it (`kill {holder.pid}` on {holder.host}), or choose another folder.",
    )


def _create(file: Path, holder: Holder) -> bool:
    """Write a claim that is not there yet; return whether it was written."""
    temporary = file.with_name(f"{CLAIM}.{holder.token}.tmp")
    temporary.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    try:
        try:
            os.link(temporary, file)
        except FileExistsError:
            # A server that answers twice reports a link of our own as existing.
            return temporary.stat().st_nlink > 1 and (found := _read(file)) is not None and found.token == holder.token
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_exclusively(file, temporary.read_bytes())
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_exclusively(file: Path, content: bytes) -> bool:
    """Write a file that is not there yet where the file system has no hard links."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def _replace(file: Path, holder: Holder) -> None:
    temporary = file.with_name(f"{CLAIM}.{holder.token}.tmp")
    temporary.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    temporary.replace(file)


def _read(file: Path) -> Holder | None:
    """Read a claim; None where there is none. A damaged one is of an unknown machine, so only its silence counts."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fields = json.loads(text)
        return Holder(
            token=str(fields["token"]),
            host=str(fields["host"]),
            machine=str(fields["machine"]),
            pid=int(fields["pid"]),
            process_started=float(fields["process_started"]),
            started=str(fields["started"]),
            command=str(fields["command"]),
        )
    except (ValueError, KeyError, TypeError):
        return Holder(f"damaged-{status.st_ino}", "an unknown machine", "", 0, 0.0, "an unknown time", "")


def _touched(file: Path) -> float | None:
    """Return the time of the last heartbeat; None without a claim."""
    try:
        # Opening a file makes a network file system look at the server.
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _server_time(folder: Path) -> float:
    """Return the present time by the clock that stamps files in a folder."""
    probe = folder / f"{CLAIM}.{os.getpid()}.now"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _make_folder(folder: Path) -> list[Path]:
    """Create a folder; return those that were missing, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove_leftovers(file: Path) -> None:
    """Remove what processes left behind that died while they claimed; while this claim holds, it means nothing."""
    with contextlib.suppress(OSError):
        now = file.stat().st_mtime
        for leftover in file.parent.glob(f"{CLAIM}.*"):
            if now - leftover.stat().st_mtime > SILENCE_SECONDS:
                leftover.unlink()


def _forget(token: str) -> None:
    left = [one for one in os.environ.get(_VARIABLE, "").split(",") if one not in ("", token)]
    if left:
        os.environ[_VARIABLE] = ",".join(left)
    else:
        os.environ.pop(_VARIABLE, None)


class _Heartbeat:
    """Touches a claim now and then, and notices if it changes hands."""

    def __init__(self, file: Path, mine: Holder) -> None:
        self._file = file
        self._mine = mine
        self._pid = os.getpid()
        self._taken_by: Holder | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._end.set()
        # A fork has no thread to wait for.
        if self._pid == os.getpid() and self._thread.is_alive():
            self._thread.join(timeout=HEARTBEAT_SECONDS)

    def check(self, where: str) -> None:
        """Raise if another process has taken the folder."""
        if self._taken_by is not None:
            raise VerificationError(
                f"{where}: {self._taken_by} has taken the folder, because this process was silent for longer than "
                f"{SILENCE_SECONDS:.0f} s. This run ends, so that only one writes"
            )

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                found = _read(self._file)
                if found is not None and found.token != self._mine.token:
                    self._taken_by = found
                    return
                os.utime(self._file)


def _machine() -> str:
    """Return what tells machines apart that share a name: the boot, and the container's numbering of processes."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts) or str(int(psutil.boot_time()))


def _process_start(pid: int) -> float | None:
    """Return when a process started; None if it has ended.

    Linux counts ticks since the boot. psutil adds the time of the boot, which moves when the clock is set.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
        except psutil.NoSuchProcess:
            return None
    # The name in parentheses may hold anything.
    state, *fields = status.rpartition(")")[2].split()
    return None if state in ("Z", "X") else float(fields[18])
