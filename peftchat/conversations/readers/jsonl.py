"""JSON lines, plain or gzipped, one bounded line at a time."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import orjson

from peftchat.conversations.problems import Kind, Problem, ProblemLog, RawRecord

_BOM = b"\xef\xbb\xbf"
_KEPT_OF_LONG_LINE = 4096


def read_jsonl(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The objects of a `.jsonl` or `.jsonl.gz` file; blank lines are not records.

    Memory is bounded by `max_record_bytes`, whatever the file holds.
    """
    name = str(path)
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(max_record_bytes + 1):
                number += 1
                if len(line) > max_record_bytes and not line.endswith(b"\n"):
                    problems.records += 1
                    problems.add(_too_long(f"{name}:{number}", max_record_bytes), line[:_KEPT_OF_LONG_LINE])
                    _skip_line(file, max_record_bytes)
                    continue
                if number == 1 and line.startswith(_BOM):
                    line = line[len(_BOM) :]
                if line.isspace() or not line:
                    continue
                problems.records += 1
                try:
                    value = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    problems.add(explain_json_error(f"{name}:{number}", line, error), line)
                    continue
                if isinstance(value, dict):
                    yield RawRecord(f"{name}:{number}", value, line)
                else:
                    problems.add(not_an_object(f"{name}:{number}", value), line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        detail = f"the gzip data is broken or cut off here ({error})"
        problems.add(Problem(f"{name}:{number + 1}", "broken_file", detail))


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
    elif "depth" in reason or "recursion" in reason:
        kind, detail = "nested_too_deep", "the JSON is nested more than a thousand levels deep"
    return Problem(where, kind, detail)


def not_an_object(where: str, value: object) -> Problem:
    """The problem of a record that is a JSON list, text or number."""
    return Problem(where, "not_an_object", f"a record must be a JSON object, this is a {type(value).__name__}")


def _too_long(where: str, limit: int) -> Problem:
    return Problem(where, "record_too_long", f"the line is longer than {limit:,} bytes")


def _skip_line(file: BinaryIO, chunk: int) -> None:
    while part := file.readline(chunk):
        if part.endswith(b"\n"):
            return


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    return path.open("rb")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
