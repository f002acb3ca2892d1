"""Parquet, Arrow and CSV tables, read in batches."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import orjson

from peftchat.conversations.problems import Problem, ProblemLog, RawRecord

_BATCH = 512
_LIST_COLUMNS = ("messages", "conversations")


def read_parquet(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The rows of a Parquet file; `where` counts rows from 1. `max_record_bytes` does not apply."""
    import pyarrow
    from pyarrow import parquet

    name = str(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    problems.records += 1
                    yield RawRecord(f"{name}:{number}", value, None)
    except UnicodeDecodeError:
        detail = f"a text in rows {number + 1} to {number + _BATCH} is not UTF-8"
        problems.add(Problem(f"{name}:{number + 1}", "not_utf8", detail))
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(Problem(f"{name}:{number + 1}", "broken_file", f"not readable Parquet: {_first_line(error)}"))


def read_csv(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The rows of a CSV file with a header; `where` is the line on which the row ends.

    A column named `messages` or `conversations` holds JSON. Bytes that are not UTF-8 become lone surrogates,
    which the checks on content find and name later.
    """
    name = str(path)
    # The csv module's own limit of 128 KiB a field is smaller than real answers, and it has one limit for all readers.
    csv.field_size_limit(max_record_bytes)
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(_bounded_lines(file, max_record_bytes), strict=True)
        try:
            for fields in rows:
                number = rows.line_num
                problems.records += 1
                where = f"{name}:{number}"
                if None in fields or None in fields.values():
                    detail = f"the row has another number of columns than the header's {len(rows.fieldnames or ())}"
                    problems.add(Problem(where, "broken_file", detail), repr(fields).encode())
                    continue
                yield RawRecord(where, _with_lists(fields), None)
        except csv.Error as error:
            problems.records += 1
            problems.add(Problem(f"{name}:{number + 1}", "broken_file", f"not readable CSV: {error}"))


def _bounded_lines(file: IO[str], limit: int) -> Iterator[str]:
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise csv.Error(f"a line is longer than {limit:,} characters")
        yield line


def _with_lists(fields: dict[str, str]) -> dict[str, object]:
    value: dict[str, object] = dict(fields)
    for column in _LIST_COLUMNS:
        if column in fields:
            try:
                value[column] = orjson.loads(fields[column])
            except ValueError:
                continue  # stays text, which the form refuses with the turn's place
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
