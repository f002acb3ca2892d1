"""A large file of JSON lines, read in parts by several processes; what they make of it comes in the file's order.

The first process finds the parts and asks the others for them in turn, two ahead, so that the memory is that of a few
parts. Small files, packed ones, and formats that join records are read by one process.
"""

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from peftchat.conversation import Conversation
from peftchat.conversations.formats import Format
from peftchat.conversations.problems import PartLog, PartOfLog, ProblemLog, RawRecord, ReadOptions
from peftchat.conversations.readers.json_values import KEYS_CHECKED
from peftchat.conversations.readers.jsonl import is_values, read_lines
from peftchat.conversations.readers.opening import check_first_bytes
from peftchat.errors import UserError
from peftchat.forked_worker import ForkedWorker, usable_cores

T = TypeVar("T")
_Reader = ForkedWorker["Part", tuple[list[Any], PartOfLog]]

_ENDINGS = (".jsonl", ".ndjson")
SMALLEST_FILE = 32 * 2**20
_HEAD = 2**16
_PART_BYTES = 2**19
_LARGE_PART = 2**22
_PARTS_AHEAD = 2
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
    return min(usable_cores(), _MOST_PROCESSES)


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
        asks_more = options.languages or options.roles or options.pairs or options.labels
        if not self.takes_plain or plain_turns is None or asks_more:
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
            readers.append(ForkedWorker(work.of_part, "reads the file", str(work.path)))
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


def _take(work: Work[T], reader: _Reader, part: Part, problems: ProblemLog) -> list[T]:
    """What was made of a part; what happened to its records goes to the log."""
    found = reader.fetch()
    if found is None:  # whatever it is that fails there shall say so here
        found = work.of_part(part)
    made, log = found
    problems.take(log)
    return made
