"""A `.json` file: one array of records, or records one after the other, read in pieces."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, RecordError
from peftchat.conversations.readers.jsonl import not_an_object

_PIECE = 2**20
_BLANK = " \t\r\n"
_KEPT_OF_BROKEN_ELEMENT = 4096
_SCAN = json.JSONDecoder().raw_decode


class _Text:
    """The file's text as a window that slides forward, so that one element is in memory and not the file.

    Bytes that are not UTF-8 become lone surrogates, which the checks on content find and name later.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.window = ""
        self.position = 0
        self.ended = False

    def __enter__(self) -> "_Text":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def extend(self) -> None:
        """Forget what was read and take in the next piece."""
        piece = self._file.read(max(_PIECE, len(self.window) - self.position))
        self.ended = not piece
        self.window = self.window[self.position :] + self._decode(piece, final=self.ended)
        self.position = 0

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
    """The objects of a `.json` file; `where` counts elements from 1.

    After a syntax error nothing behind it can be trusted, so the file ends there with one problem.
    """
    name = str(path)
    number = 0
    with _Text(path) as text:
        in_array = text.next_character() == "["
        if in_array:
            text.position += 1
        while character := text.next_character():
            if in_array and character == "]":
                text.position += 1
                break
            number += 1
            where = f"{name}:{number}"
            problems.records += 1
            try:
                value, raw = _element(text, max_record_bytes)
            except RecordError as error:
                raw = text.window[text.position : text.position + _KEPT_OF_BROKEN_ELEMENT]
                problems.add(Problem(where, error.kind, error.detail), raw.encode(errors="replace"))
                return
            if len(raw) > max_record_bytes:
                problems.add(_too_long(where, max_record_bytes), raw[:_KEPT_OF_BROKEN_ELEMENT].encode(errors="replace"))
            elif isinstance(value, dict):
                yield RawRecord(where, value, raw.encode(errors="surrogateescape"))
            else:
                problems.add(not_an_object(where, value), raw.encode(errors="replace"))
            if in_array and text.next_character() == ",":
                text.position += 1
            elif in_array and text.next_character() != "]":
                problems.add(Problem(where, "not_json", "no comma or closing bracket behind this element"))
                return
        if in_array and text.window[text.position - 1 : text.position] != "]":
            problems.add(Problem(f"{name}:{number}", "broken_file", "the array is cut off: no closing bracket"))
        elif text.next_character():
            problems.add(Problem(f"{name}:{number}", "not_json", "there is text behind the closing bracket"))


def _element(text: _Text, limit: int) -> tuple[Any, str]:
    """The value at the text's position and the text it was read from; the text moves behind it."""
    while True:
        try:
            value, end = _SCAN(text.window, text.position)
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
        except ValueError as error:
            # A number of more than 4,300 digits.
            raise RecordError("not_json", f"not JSON: {error}") from None
        else:
            raw = text.window[text.position : end]
            text.position = end
            return value, raw


def _too_long(where: str, limit: int) -> Problem:
    return Problem(where, "record_too_long", f"the element is longer than {limit:,} characters")
