"""Parquet, Arrow and CSV tables, read in batches."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from peftchat.conversations.problems import Problem, ProblemLog, RawRecord
from peftchat.conversations.readers.arrow_json import Decoder, decoder_of_fields
from peftchat.conversations.readers.json_values import broken_packing
from peftchat.conversations.readers.opening import BrokenPacking, as_text, check_first_bytes, open_text
from peftchat.errors import UserError

_BATCH = 512
_BUFFER = 2**20
_ARROW_FILE = b"ARROW1"
_DELIMITER_LINE = re.compile(rb"(?:\xef\xbb\xbf)?\"?sep=([;,\t|])\"?\r?\n")
"""The line above the header in which Excel keeps the delimiter."""


def read_parquet(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The rows of a Parquet file; `where` counts rows from 1. `max_record_bytes` does not apply.

    Raises:
        UserError: it is another kind of file.
    """
    import pyarrow
    from pyarrow import parquet

    _check_kind(path, b"PAR1")
    rows = _Rows(str(path), problems)
    try:
        # With buffers of its own for each column, Arrow reads pages as they are needed, and not whole row groups.
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            _check_fields(str(path), file.schema_arrow)
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from rows.of(batch)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        rows.end(f"not readable Parquet: {_first_line(error)}")


def read_arrow(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The rows of an Arrow file, as `datasets.save_to_disk` or Feather writes it; see `read_parquet`.

    Raises:
        UserError: it is another kind of file.
    """
    import pyarrow
    from pyarrow import ipc

    _check_kind(path, _ARROW_FILE)
    rows = _Rows(str(path), problems)
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in _arrow_batches(source, ipc):
                _check_fields(str(path), batch.schema)
                for start in range(0, batch.num_rows, _BATCH):
                    yield from rows.of(batch.slice(start, _BATCH))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        rows.end(f"not readable Arrow data: {_first_line(error)}")


def _arrow_batches(source: Any, ipc: Any) -> Iterator[Any]:
    if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
        file = ipc.open_file(source)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
        return
    source.seek(0)
    yield from ipc.open_stream(source)


def _check_kind(path: Path, own: bytes) -> None:
    with path.open("rb") as file:
        check_first_bytes(path, file.read(512), own)


class _Rows:
    """The rows of one table as records."""

    def __init__(self, name: str, problems: ProblemLog) -> None:
        self._name = name
        self._problems = problems
        self._number = 0
        self._decode: tuple[Any, Decoder | None] = (None, None)

    def of(self, batch: Any) -> Iterator[RawRecord]:
        """The rows of a batch; one whose text is not UTF-8 goes to the log."""
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:
            values = [self._row(batch, number) for number in range(batch.num_rows)]
        if self._decode[0] is not batch.schema:
            self._decode = (batch.schema, decoder_of_fields(batch.schema))
        decode = self._decode[1]
        for value in values if decode is None else map(decode, values):
            self._number += 1
            self._problems.records += 1
            where = f"{self._name}:{self._number}"
            if value is None:
                self._problems.add(Problem(where, "not_utf8", "a text in this row is not UTF-8"))
            else:
                yield RawRecord(where, value, None)

    @staticmethod
    def _row(batch: Any, number: int) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError:
            return None
        return value

    def end(self, why: str) -> None:
        """Count that the file cannot be read on from here."""
        detail = f"{why}; everything behind row {self._number} was not read"
        self._problems.add(Problem(f"{self._name}:{self._number + 1}", "broken_file", detail))


def read_csv(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The rows of a CSV or TSV file with a header; `where` is the line on which the row ends.

    A CSV whose header has semicolons or tabs and no comma is split at those. A list of turns is JSON
    text. Bytes that are not UTF-8 become lone surrogates, which the checks on content find and name later.

    Raises:
        UserError: it is another kind of file.
    """
    name = str(path)
    # The csv module's own limit of 128 KiB a field is smaller than real answers, and it has one limit for all readers.
    csv.field_size_limit(max_record_bytes)
    number = 0
    try:
        with open_text(path) as file:
            named = _DELIMITER_LINE.match(file.peek())
            delimiter = named[1].decode() if named else _delimiter(path, file.peek())
            lines = _bounded_lines(as_text(file), max_record_bytes)
            if named:
                next(lines)
            rows = csv.DictReader(lines, strict=True, delimiter=delimiter)
            rows.fieldnames = [column.strip() for column in rows.fieldnames or ()]
            _check_header(f"{name}:{2 if named else 1}", rows.fieldnames, "the header has the column")
            for fields in rows:
                number = rows.line_num + bool(named)
                problems.records += 1
                where = f"{name}:{number}"
                if None in fields or None in fields.values():
                    detail = f"the row has another number of columns than the header's {len(rows.fieldnames or ())}"
                    problems.add(Problem(where, "other_columns", detail), repr(fields).encode(errors="replace"))
                    continue
                yield RawRecord(where, dict(fields), None)
    except csv.Error as error:
        detail = f"not readable CSV: {error}; everything behind line {number} was not read"
        problems.add(Problem(f"{name}:{number + 1}", "broken_file", detail))
    except BrokenPacking as error:
        problems.add(broken_packing(f"{name}:{number + 1}", error))


def _delimiter(path: Path, head: bytes) -> str:
    if path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv"):
        return "\t"
    header = re.split(rb"[\r\n]", head.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n"), maxsplit=1)[0]
    found = {mark: header.count(mark.encode()) for mark in ";\t|"}
    most = max(found, key=found.__getitem__)
    return most if found[most] and b"," not in header else ","


def _check_header(where: str, columns: Sequence[str], what: str) -> None:
    """Check that no two columns, or fields of an object, have one name: only one of them would be read.

    Raises:
        UserError: they have.
    """
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        hint = "Rename or remove one of them."
        raise UserError(f"{what} {twice[0]!r} twice", where=where, hint=hint)


def _check_fields(where: str, fields: Any, what: str = "the table has the column") -> None:
    """Check the columns of a table, or the fields of a struct, and those of the structs in them.

    Raises:
        UserError: two of one place have one name.
    """
    from pyarrow import types

    fields = list(fields)
    _check_header(where, [field.name for field in fields], what)
    for field in fields:
        inner = field.type
        while hasattr(inner, "value_type"):  # a list, or a dictionary
            inner = inner.value_type
        if types.is_struct(inner):
            parts = [inner.field(index) for index in range(inner.num_fields)]
            _check_fields(where, parts, f"the objects of {field.name!r} have the field")


def _bounded_lines(file: IO[str], limit: int) -> Iterator[str]:
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise csv.Error(f"a line is longer than {limit:,} characters")
        yield line


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
