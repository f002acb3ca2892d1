"""A `.json` file: one array of records, or records one after the other, read in pieces."""

import codecs
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, RecordError
from peftchat.conversations.readers.opening import BrokenPacking, open_text
from peftchat.errors import UserError
from peftchat.json_text import Number, exact_integer, parse_json, write_json

_PIECE = 2**20
_BLANK = " \t\r\n"
_KEPT_OF_BROKEN_ELEMENT = 2**17
_KEPT_OF_LONG_ELEMENT = 4096
_KEY_OF_LIST = re.compile(r'\{\s*"([^"\\]{1,80})"\s*:\s*\[\s*\{')
_KEYS_OF_PARTS = {"role", "from", "content", "value", "text", "type", "function", "name", "speaker", "author"}
"""Fields of a turn, a tool or a call: a list of objects with one of them is part of a record."""


def _finite(spelling: str) -> float:
    value = float(spelling)
    return value if math.isfinite(value) else Number(spelling)


_SCAN = json.JSONDecoder(parse_float=_finite).raw_decode
_SCAN_LONG_NUMBERS = json.JSONDecoder(parse_float=Number, parse_int=exact_integer).raw_decode


class _Text:
    """The file's text as a window that slides forward, so that one element is in memory and not the file.

    Bytes that are not UTF-8 become lone surrogates, which the checks on content find and name later.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._damage: Exception | None = None
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.window = ""
        self.position = 0
        self.ended = False

    def extend(self) -> None:
        """Forget what was read and take in the next piece."""
        piece = self._read(max(_PIECE, len(self.window) - self.position))
        self.ended = not piece
        self.window = self.window[self.position :] + self._decode(piece, final=self.ended)
        self.position = 0

    def _read(self, size: int) -> bytes:
        """The next bytes; what stands before a damage comes before the damage is reported."""
        if self._damage is not None:
            raise self._damage
        pieces: list[bytes] = []
        try:
            while size > 0 and (piece := self._file.read1(size)):
                pieces.append(piece)
                size -= len(piece)
        except BrokenPacking as error:
            self._damage = error
            if not pieces:
                raise
        return b"".join(pieces)

    def next_character(self) -> str:
        """The next character that is not blank, "" at the end; it is not consumed."""
        while True:
            while self.position < len(self.window):
                if (character := self.window[self.position]) not in _BLANK:
                    return character
                self.position += 1
            if self.ended:
                return ""
            self.extend()


def read_json_values(path: Path, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The objects of a `.json` file; see `read_values`.

    Raises:
        UserError: as `open_text` and `read_values`.
    """
    try:
        with open_text(path) as file:
            yield from read_values(file, str(path), max_record_bytes, problems)
    except BrokenPacking as error:
        # Opening failed: the file ends before its first byte is unpacked.
        problems.add(broken_packing(f"{path}:1", error))


def read_values(file: io.BufferedReader, name: str, max_record_bytes: int, problems: ProblemLog) -> Iterator[RawRecord]:
    """The objects of an array, or objects one after the other; `where` counts elements from 1.

    After a syntax error nothing behind it can be trusted, so the file ends there: a problem of the kind `broken_file`.

    Raises:
        UserError: the records are below a key of one object.
    """
    elements = _Elements(_Text(file), name, max_record_bytes, problems)
    try:
        yield from elements.read()
    except BrokenPacking as error:
        elements.count_damage(error)


class _Elements:
    """One pass over the elements of a file."""

    def __init__(self, text: _Text, name: str, limit: int, problems: ProblemLog) -> None:
        self._text = text
        self._name = name
        self._limit = limit
        self._problems = problems
        self._number = 0
        self._is_reading = False

    @property
    def where(self) -> str:
        """The place of the element that is read."""
        return f"{self._name}:{self._number}"

    def count_damage(self, error: Exception) -> None:
        """Count that the packed data ends in the middle; the element that is cut is no record."""
        self._problems.records -= self._is_reading
        where = self.where if self._is_reading else f"{self._name}:{self._number + 1}"
        self._problems.add(broken_packing(where, error))

    def read(self) -> Iterator[RawRecord]:
        """The objects; anything else goes to the log."""
        text = self._text
        in_array = text.next_character() == "["
        if in_array:
            text.position += 1
        while character := text.next_character():
            if in_array and character == "]":
                text.position += 1
                break
            self._number += 1
            self._problems.records += 1
            self._is_reading = True
            try:
                value, raw = _element(text, self._limit)
            except RecordError as error:
                self._end_at(error, in_array)
                return
            self._is_reading = False
            if isinstance(value, dict) and is_with_constants(raw):
                value = without_constants(raw, self._problems) or value
            if not in_array and self._number == 1 and isinstance(value, dict) and not text.next_character():
                _check_not_a_container(self._name, value)
            if len(raw) > self._limit:
                start = raw[:_KEPT_OF_LONG_ELEMENT].encode(errors="replace")
                self._problems.add(_too_long(self.where, self._limit), start)
            elif self._number <= KEYS_CHECKED and (problem := repeated_key(self.where, raw)):
                self._problems.add(problem, raw.encode(errors="replace"))
            elif (fields := as_fields(value)) is not None:
                yield RawRecord(self.where, fields, raw.encode(errors="surrogateescape"))
            else:
                self._problems.add(not_an_object(self.where, value), raw.encode(errors="replace"))
            if in_array and text.next_character() == ",":
                text.position += 1
            elif in_array and text.next_character() != "]":
                what = "no comma or closing bracket behind this element" if text.next_character() else "the file ends"
                self._unread(what)
                return
        if in_array and text.window[text.position - 1 : text.position] != "]":
            self._unread("the array is cut off: no closing bracket")
        elif text.next_character():
            self._unread("there is text behind the closing bracket")

    def _end_at(self, error: RecordError, in_array: bool) -> None:
        """Count the element that cannot be read, and that reading ended with it."""
        text = self._text
        raw = text.window[text.position : text.position + _KEPT_OF_BROKEN_ELEMENT]
        if error.kind == "record_too_long":
            if not in_array and self._number == 1 and (match := _KEY_OF_LIST.match(raw)):
                raise _below_a_key(self._name, [match[1]])
            raw = raw[:_KEPT_OF_LONG_ELEMENT]
        if error.kind == "not_json":
            self._problems.records -= 1
            self._unread(error.detail, raw.encode(errors="replace"))
        else:
            self._problems.add(Problem(self.where, error.kind, error.detail), raw.encode(errors="replace"))
            self._unread("the end of this element cannot be found")

    def _unread(self, why: str, raw: bytes | None = None) -> None:
        detail = f"{why}; everything behind element {self._number} was not read"
        self._problems.add(Problem(self.where, "broken_file", detail), raw)


KEYS_CHECKED = 1_000
"""Records of a file in which keys are looked for that are there twice. It costs twice the time of reading them."""


def repeated_key(where: str, text: str | bytes) -> Problem | None:
    """The problem of a record in which an object has one key twice: JSON's readers keep the last value alone."""
    twice: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        if len({name for name, _ in pairs}) < len(pairs):
            twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)

    try:
        json.loads(text, object_pairs_hook=look)
    except (ValueError, RecursionError):  # what the reader makes of it is another question
        return None
    detail = f"the key {twice[0][:80]!r} is there twice in one object; only one value could be kept" if twice else ""
    return Problem(where, "repeated_key", detail) if twice else None


def broken_packing(where: str, error: Exception) -> Problem:
    """The problem of packed data that is damaged or cut off."""
    line = where.rpartition(":")[2]
    detail = f"the packed data is broken or cut off ({error}); everything from line {line} on was not read"
    return Problem(where, "broken_file", detail)


def is_with_constants(text: str | bytes) -> bool:
    """Whether a text may hold `NaN` or `Infinity`, which are no JSON."""
    return (b"NaN" in text or b"Infinity" in text) if isinstance(text, bytes) else ("NaN" in text or "Infinity" in text)


def without_constants(text: str, problems: ProblemLog) -> dict[str, Any] | None:
    """The fields of a record, those that are `NaN` or `Infinity` left out and counted.

    None if it is no object, or holds them elsewhere: there they would be part of what is trained, or kept.
    """
    try:
        fields = parse_json(text, constants=True)
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    absent = [name for name, value in fields.items() if type(value) is float and not math.isfinite(value)]
    kept = {name: value for name, value in fields.items() if name not in absent}
    try:
        write_json(kept)
    except ValueError:
        return None
    problems.notes["constants_removed"] += len(absent)
    return kept


def as_fields(value: object) -> dict[str, Any] | None:
    """The fields of a record: of an object, or of a list of turns, which is a conversation without a name."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return {"messages": value}
    return None


def not_an_object(where: str, value: object) -> Problem:
    """The problem of a record that is a JSON list, text or number."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list of something else"}
    found = names.get(type(value), "a number")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        found = "an object that was encoded twice, as text; jq -c fromjson FILE undoes it"
    return Problem(where, "not_an_object", f"a record must be a JSON object or a list of turns, this is {found}")


def _check_not_a_container(name: str, value: dict[str, Any]) -> None:
    """Check that the only object of a file is a record, not the place where the records are.

    Raises:
        UserError: it holds lists of objects that are no turns, tools or calls.
    """
    _check_not_columns(name, value)
    keys = [
        key
        for key, items in value.items()
        if isinstance(items, list)
        and items
        and all(isinstance(item, dict) for item in items)
        and not _KEYS_OF_PARTS & items[0].keys()
    ]
    if keys and not any(isinstance(items, list) and items and key not in keys for key, items in value.items()):
        raise _below_a_key(name, keys)


def _check_not_columns(name: str, value: dict[str, Any]) -> None:
    """Check that the only object of a file is not one of columns, or of records by their names.

    Raises:
        UserError: it is.
    """
    parts = list(value.values())
    if len(parts) < 2:
        return
    if all(isinstance(part, dict) and part and part.keys() == parts[0].keys() for part in parts):
        by_number = all(key.isdecimal() for key in parts[0])
        what = "columns, each with its values by number" if by_number else "records, each below a name of its own"
        cure = "df.to_json(FILE, orient='records', lines=True)" if by_number else "jq -c '.[]' FILE > FILE.jsonl"
    elif all(isinstance(part, list) and len(part) == len(parts[0]) > 0 for part in parts) and not any(
        isinstance(item, dict) for part in parts for item in part
    ):
        what, cure = (
            "columns, each a list of values",
            "pandas.read_json(FILE).to_json(NEW, orient='records', lines=True)",
        )
    else:
        return
    raise UserError(f"the file is one object of {what}", where=name, hint=f"Write one record after the other: {cure}")


def _below_a_key(name: str, keys: list[str]) -> UserError:
    named = " and ".join(f"`{key}`" for key in keys)
    return UserError(
        f"the file is one object, and its records are below the key{'s' if len(keys) > 1 else ''} {named}",
        where=name,
        hint=f"Write the records alone: jq -c '.[\"{keys[0]}\"][]' FILE > FILE.jsonl",
    )


def _element(text: _Text, limit: int) -> tuple[Any, str]:
    """The value at the text's position and the text it was read from; the text moves behind it."""
    while True:
        try:
            value, end = _scan(text)
        except RecursionError:
            raise RecordError("nested_too_deep", "the JSON is nested too deep") from None
        except json.JSONDecodeError as error:
            # An error far from the window's end is one; an open string or an error at the end may be a cut.
            cut = error.msg.startswith("Unterminated string") or error.pos > len(text.window) - 16
            if "\udc80" <= text.window[error.pos : error.pos + 1] <= "\udcff":
                raise RecordError("not_utf8", "not UTF-8 text; save the file as UTF-8") from None
            if text.ended or not cut:
                raise RecordError("not_json", f"not JSON: {error.msg}") from None
            if len(text.window) - text.position > limit:
                raise RecordError("record_too_long", _too_long("", limit).detail) from None
            text.extend()
        else:
            raw = text.window[text.position : end]
            text.position = end
            return value, raw


def _scan(text: _Text) -> tuple[Any, int]:
    try:
        return _SCAN(text.window, text.position)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python converts no integer of more than 4,300 digits
        return _SCAN_LONG_NUMBERS(text.window, text.position)


def _too_long(where: str, limit: int) -> Problem:
    return Problem(where, "record_too_long", f"the element is longer than {limit:,} characters")
