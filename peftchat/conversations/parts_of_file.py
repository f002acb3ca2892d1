"""A large file of JSON lines, read in parts by several processes; what they make of it comes in the file's order.

The first process finds the parts and asks the others for them in turn, two ahead, so that the memory is that of a few
parts. Small files, packed ones, and formats that join records are read by one process.
"""

import gc
import io
import itertools
import os
import pickle
import signal
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, NoReturn, TypeVar

from peftchat.child_process import child_environment, end_with_parent
from peftchat.conversation import Conversation
from peftchat.conversations.formats import Format
from peftchat.conversations.problems import PartLog, PartOfLog, ProblemLog, RawRecord, ReadOptions
from peftchat.conversations.readers.json_values import KEYS_CHECKED
from peftchat.conversations.readers.jsonl import is_values, read_lines
from peftchat.conversations.readers.opening import check_first_bytes
from peftchat.errors import UserError

T = TypeVar("T")

_ENDINGS = (".jsonl", ".ndjson")
SMALLEST_FILE = 32 * 2**20
_HEAD = 2**16
_BYTES_OF_SIZE = 8
_PART_BYTES = 2**19
_LARGE_PART = 2**22
_PIPE_BYTES = 2**20
"""What is made of a part fits into the pipe, so that a process goes on with the next one while others are at work."""
_PARTS_AHEAD = 2
_REQUEST = struct.Struct("<QQQ")
"""A part, as it is asked for: its fields."""
_MOST_PROCESSES = 4
"""One process takes what this many make."""


@dataclass(frozen=True, slots=True)
class Part:
    """Whole lines of a file.

    Attributes:
        start: the offset of the first byte.
        end: the offset behind the last one.
        lines_before: how many lines the file has before.
    """

    start: int
    end: int
    lines_before: int


class _Bytes(io.RawIOBase):
    """The bytes of a part, as a file."""

    def __init__(self, file: BinaryIO, part: Part) -> None:
        self._file = file
        self._left = part.end - part.start
        file.seek(part.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        count = self._file.readinto(memoryview(buffer)[: self._left])  # type: ignore[attr-defined]
        self._left -= count
        return int(count)


def is_read_in_parts(path: Path) -> bool:
    """Whether a file is large enough, and of lines that can be found without reading what is in them."""
    if usable_processes() < 2 or path.suffix.lower() not in _ENDINGS:
        return False
    try:
        if path.stat().st_size < SMALLEST_FILE:
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:  # the reader says it
        return False
    return b"\n" in head and not is_values(head) and _is_text(path, head)


def _is_text(path: Path, head: bytes) -> bool:
    try:
        check_first_bytes(path, head)
    except UserError:  # the reader says it, when it comes to this file
        return False
    return True


def usable_processes() -> int:
    """How many processes may read one file: 1 where a process cannot go on as two."""
    if sys.platform != "linux":
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


def parts_of(path: Path) -> Iterator[Part]:
    """The parts of a file; the first has all lines in which the reader looks at more than in others."""
    start = end = before = lines = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_PART_BYTES):
            lines += block.count(b"\n")
            cut = block.rfind(b"\n") + 1
            if cut and before + lines >= KEYS_CHECKED:
                yield Part(start, end + cut, before)
                before += lines
                start, lines = end + cut, 0
            end += len(block)
    if end > start:
        yield Part(start, end, before)


def records_of(path: Path, part: Part, options: ReadOptions, problems: ProblemLog) -> Iterator[RawRecord]:
    """The records of a part."""
    with path.open("rb", buffering=0) as file, _lines_of(file, part) as lines:
        yield from read_lines(lines, str(path), options.max_record_bytes, problems, part.lines_before)


def _lines_of(file: BinaryIO, part: Part) -> BinaryIO:
    """The bytes of a part; of one that a very long line has made large, a piece at a time."""
    size = part.end - part.start
    if size > _LARGE_PART:
        return io.BufferedReader(_Bytes(file, part), 2**16)
    file.seek(part.start)
    return io.BytesIO(file.read(size))


class PlainRecord(NamedTuple):
    """A record that needs not become a conversation before it is written.

    Attributes:
        source: its place.
        turns: as `Format.plain_turns` gives them.
    """

    source: str
    turns: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """What is made of a file.

    Attributes:
        path: the file.
        format: of its records.
        options: of the reading.
        make: what becomes of the conversations of a part; it must be possible to pickle that.
        takes_plain: whether `make` takes plain records as they are, besides conversations.
    """

    path: Path
    format: Format
    options: ReadOptions
    make: Callable[[Iterable[Any]], Iterator[T]]
    takes_plain: bool = False

    def of_part(self, part: Part) -> tuple[list[T], PartOfLog]:
        """What is made of a part, and what happened to its records."""
        log = PartLog()
        records = records_of(self.path, part, self.options, log)
        made = list(self.make(self._conversations(records, log)))
        return made, log.part()

    def _conversations(self, records: Iterator[RawRecord], log: ProblemLog) -> Iterator[Conversation | PlainRecord]:
        plain_turns = self.format.plain_turns
        options = self.options
        if not self.takes_plain or plain_turns is None or options.languages or options.roles or options.pairs:
            yield from self.format.read(records, self.options, log)
            return
        # The format reads ahead over plain records, which are put here and come before what it makes of the next one.
        plain: list[PlainRecord] = []

        def others() -> Iterator[RawRecord]:
            for record in records:
                turns = plain_turns(record.value)
                if turns is None:
                    yield record
                else:
                    plain.append(PlainRecord(record.where, turns))

        for conversation in self.format.read(others(), self.options, log):
            yield from plain
            plain.clear()
            yield conversation
        yield from plain


def read_rest(work: Work[T], problems: ProblemLog) -> Iterator[T]:
    """What is made of all parts but the first, in order.

    Raises:
        UserError: a process was ended from outside.
    """
    readers: list[_Reader] = []
    count = usable_processes()
    try:
        for _ in range(count):
            readers.append(_start(work, readers))
        ahead: deque[tuple[_Reader, Part]] = deque()
        for reader, part in zip(itertools.cycle(readers), itertools.islice(parts_of(work.path), 1, None)):
            if len(ahead) == count * _PARTS_AHEAD:
                yield from _take(work, *ahead.popleft(), problems)
            reader.ask(part)
            ahead.append((reader, part))
        while ahead:
            yield from _take(work, *ahead.popleft(), problems)
    finally:
        for reader in readers:
            reader.end()


def _take(work: Work[T], reader: "_Reader", part: Part, problems: ProblemLog) -> list[T]:
    """What was made of a part; what happened to its records goes to the log."""
    found = reader.fetch()
    if found is None:  # whatever it is that fails there shall say so here
        found = work.of_part(part)
    made, log = found
    problems.take(log)
    return made


@dataclass(slots=True)
class _Reader:
    """A process that reads, and two pipes: from it, and to it."""

    pid: int
    pipe: BinaryIO
    requests: BinaryIO
    name: str

    def ask(self, part: Part) -> None:
        """Let it read one more part."""
        with suppress(BrokenPipeError):  # `fetch` says that it is gone
            self.requests.write(_REQUEST.pack(part.start, part.end, part.lines_before))

    def fetch(self) -> tuple[list, PartOfLog] | None:
        """What was made of the next part; None where that failed."""
        count, blocks = self._number(), []
        for _ in range(count):
            size = self._number()
            blocks.append(self.pipe.read(size))
            if len(blocks[-1]) < size:
                count = 0
        if not count:
            hint = "The system ends processes when memory runs out; look at `dmesg`."
            raise UserError("a process that reads the file was ended from outside", where=self.name, hint=hint)
        return pickle.loads(blocks[0], buffers=blocks[1:])  # noqa: S301 - from a fork of this process, through a pipe

    def _number(self) -> int:
        return int.from_bytes(self.pipe.read(_BYTES_OF_SIZE))

    def end(self) -> None:
        """End the process, whatever it does."""
        self.pipe.close()
        self.requests.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _start(work: Work[T], others: Iterable[_Reader]) -> _Reader:
    """Start a process for some of the parts.

    It is a fork: it has nothing to import, and the caller's script need not be one that can be imported. It writes to
    its pipe alone, and leaves without a word to anything that this process has open.
    """
    import fcntl  # not on Windows

    source, target = os.pipe()
    asked, asking = os.pipe()
    with suppress(OSError):  # the system's limit; the smaller pipe will do
        fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    environment = child_environment({})
    pid = os.fork()
    if pid:
        os.close(target)
        os.close(asked)
        return _Reader(pid, os.fdopen(source, "rb"), os.fdopen(asking, "wb", buffering=0), str(work.path))
    try:
        end_with_parent(environment)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
        for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(ending, signal.SIG_DFL)
        os.close(source)
        os.close(asking)
        for other in others:
            os.close(other.pipe.fileno())
            os.close(other.requests.fileno())
        _serve(work, asked, target)
    finally:
        os._exit(1)


def _serve(work: Work[T], asked: int, target: int) -> NoReturn:
    gc.freeze()  # the memory that both processes have stays one
    with os.fdopen(asked, "rb") as requests, os.fdopen(target, "wb") as pipe:
        while request := requests.read(_REQUEST.size):
            part = Part(*_REQUEST.unpack(request))
            # What says that it may travel beside the pickle is copied once less.
            beside: list[pickle.PickleBuffer] = []
            try:
                found = pickle.dumps(work.of_part(part), pickle.HIGHEST_PROTOCOL, buffer_callback=beside.append)
            except Exception:
                found, beside = pickle.dumps(None), []
            blocks = [memoryview(found), *(block.raw() for block in beside)]
            pipe.write(len(blocks).to_bytes(_BYTES_OF_SIZE))
            for block in blocks:
                pipe.write(len(block).to_bytes(_BYTES_OF_SIZE))
                pipe.write(block)
            pipe.flush()
    os._exit(0)
