"""JSON lines, plain or packed, one bounded line at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from peftchat.conversations.problems import Kind, Problem, ProblemLog, RawRecord
from peftchat.conversations.readers.json_values import (
    KEYS_CHECKED,
    as_fields,
    broken_packing,
    is_with_constants,
    not_an_object,
    read_values,
    repeated_key,
    without_constants,
)
from peftchat.conversations.readers.opening import BrokenPacking, open_text
from peftchat.json_text import parse_json

_BOM = b"\xef\xbb\xbf"
_KEPT_OF_LONG_LINE = 4096


def read_jsonl(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The objects of a `.jsonl` file; blank lines are not records.

    Memory is bounded by `max_record_bytes`, whatever the file holds. A file that is an array, or one record over
    several lines, is read as `.json`.

    Raises:
        UserError: as `open_text`.
    """
    name = str(path)
    try:
        with open_text(path) as file:
            if is_values(file.peek()):
                yield from read_values(file, name, max_record_bytes, problems)
            else:
                yield from read_lines(file, name, max_record_bytes, problems)
    except BrokenPacking as error:
        problems.add(broken_packing(f"{name}:1", error))


def is_values(head: bytes) -> bool:
    """Whether a file is JSON that does not end with its lines, judged by its first bytes."""
    first, line_end, rest = head.removeprefix(_BOM).lstrip().partition(b"\n")
    if first.strip() == b"{":
        return True
    if not first.startswith(b"["):
        return False
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        return True
    # Complete lists line by line are one conversation each, not one array.
    return not (line_end and rest.strip())


def read_lines(
    file: BinaryIO, name: str, max_record_bytes: int, problems: ProblemLog, before: int = 0
) -> Iterator[RawRecord]:
    """The objects of lines.

    Args:
        file: the lines.
        name: of the file that they are from, for places.
        max_record_bytes: a longer line is a problem.
        problems: where bad records are counted.
        before: the number of lines that the file has before these.
    """
    number = before
    try:
        while line := file.readline(max_record_bytes + 1):
            number += 1
            if len(line) > max_record_bytes and not line.endswith(b"\n"):
                problems.records += 1
                problems.add(_too_long(f"{name}:{number}", max_record_bytes), line[:_KEPT_OF_LONG_LINE])
                _skip_line(file, max_record_bytes)
                continue
            if line.startswith(_BOM):  # also in the middle, where files were put one behind the other
                line = line[len(_BOM) :]
            if line.isspace() or not line:
                continue
            problems.records += 1
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                value = _parse_other(line, str(error), problems)
                if value is None:
                    problem = explain_json_error(f"{name}:{number}", line, error)
                    problems.records -= problem.kind == "broken_file"
                    problems.add(problem, line)
                    continue
            if number <= KEYS_CHECKED and (twice := repeated_key(f"{name}:{number}", line)):
                problems.add(twice, line)
                continue
            fields = value if type(value) is dict else as_fields(value)
            if fields is None:
                problems.add(not_an_object(f"{name}:{number}", value), line)
            else:
                yield RawRecord(f"{name}:{number}", fields, line)
    except BrokenPacking as error:
        problems.add(broken_packing(f"{name}:{number + 1}", error))


def _parse_other(line: bytes, fault: str, problems: ProblemLog) -> Any:
    """The value of a line that orjson refuses and that can be used all the same, else None.

    Numbers beyond those of a double are JSON: https://github.com/ijl/orjson#types. Fields that are NaN or Infinity, as
    pandas and Python write them, are taken as absent.
    """
    if "number" in fault:
        try:
            return parse_json(line.decode())
        except ValueError:
            return None
    return without_constants(line.decode(errors="replace"), problems) if is_with_constants(line) else None


def explain_json_error(where: str, line: bytes, error: ValueError) -> Problem:
    """The reason why `line` is not usable JSON, as precise as it can be told."""
    reason = str(error)
    kind: Kind = "not_json"
    detail = f"not JSON: {reason}"
    if not _is_utf8(line):
        kind, detail = "not_utf8", "not UTF-8 text; save the file as UTF-8"
    elif b"\x00" in line:
        kind, detail = "nul_character", "the line holds a NUL byte"
    elif "surrogate" in reason:
        kind, detail = "lone_surrogate", f"half of a surrogate pair: {reason}"
    elif not line.endswith(b"\n") and "end of data" in reason:
        kind = "broken_file"
        detail = f"the file ends in the middle of line {line_of(where)}; what was behind it is missing"
    elif line.rstrip().endswith(b"},"):
        detail = "a comma stands behind the record; remove it, or put the records between [ and ] in a .json file"
    elif line.lstrip().startswith((b"{'", b"[{'")):
        detail = "this is an object of Python, with its quotes, and not JSON; write it with json.dumps"
    elif "depth" in reason or "recursion" in reason:
        kind, detail = "nested_too_deep", "the JSON is nested more than a thousand levels deep"
    return Problem(where, kind, detail)


def line_of(where: str) -> str:
    """The number behind the file's name."""
    return where.rpartition(":")[2]


def _too_long(where: str, limit: int) -> Problem:
    return Problem(where, "record_too_long", f"the line is longer than {limit:,} bytes")


def _skip_line(file: BinaryIO, chunk: int) -> None:
    while part := file.readline(chunk):
        if part.endswith(b"\n"):
            return


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
