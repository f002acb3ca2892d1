"""Answers of a model to the harness's requests, kept as they come, so that an evaluation can go on after an end.

A line per answer in a file per model. The key of a request is a digest of everything that the model is asked, so other
tasks, shots or templates never take an answer that is not theirs.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

Key = tuple[str, str]
"""The kind of a request, and the digest of its arguments."""


def request_key(kind: str, arguments: Iterable[Any]) -> Key:
    """Return the key of a request.

    Args:
        kind: the harness's name of it: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
        arguments: the texts and settings that the model is asked with.
    """
    text = json.dumps([kind, *arguments], sort_keys=True, default=str)
    return kind, hashlib.sha256(text.encode()).hexdigest()


class KeptAnswers:
    """The answers of one model. Use it as a context manager.

    Args:
        path: the file; created with the first answer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[Key, Any] = {}
        self._cut: set[Key] = set()
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __getitem__(self, key: Key) -> Any:
        return self._found[key]

    def is_cut(self, key: Key) -> bool:
        """Whether the beginning of the request did not fit into the model's context."""
        return key in self._cut

    def add(self, key: Key, answer: Any, *, cut: bool) -> None:
        """Keep an answer; it is in the file when this returns.

        Args:
            key: from `request_key`.
            answer: a JSON value.
            cut: whether the beginning of the request did not fit into the model's context.
        """
        if key in self._found:
            return
        self._store(key, answer, cut)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _end_last_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        line = {"kind": key[0], "request": key[1], "answer": answer, **({"cut": True} if cut else {})}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _store(self, key: Key, answer: Any, cut: bool) -> None:
        self._found[key] = answer
        if cut:
            self._cut.add(key)

    def _read(self) -> None:
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                found = json.loads(line)
                self._store((found["kind"], found["request"]), found["answer"], bool(found.get("cut")))
            except (ValueError, KeyError, TypeError):
                continue  # The end of a line that a killed process was writing.


def _end_last_line(path: Path) -> None:
    """End a line that a killed process left unfinished."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
