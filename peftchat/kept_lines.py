"""Lines that are kept as they come: a file of JSON lines that survives a crash and is continued."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peftchat.errors import UserError
from peftchat.files import write_text


class KeptLines:
    """A file of JSON objects, one a line, to which lines are added one by one.

    Args:
        path: the file; it is made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the complete lines; one that was cut off at the end is left out.

        Raises:
            UserError: another line is no JSON object.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        found: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                if number == len(lines):
                    return found
                hint = "Remove the line; what it held is then made again."
                raise UserError("the line is no JSON object", where=f"{self.path}:{number}", hint=hint) from error
            found.append(value)
        return found

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Add lines and flush them to the disk; what was cut off at the end of the file is removed first."""
        text = "".join(as_line(value) for value in values)
        if not self._ends_with_line():
            self.rewrite(self.read())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Replace the whole file at once."""
        write_text(self.path, "".join(as_line(value) for value in values))

    @contextmanager
    def claimed(self, where: str) -> Iterator[None]:
        """Hold the file for this process.

        Raises:
            UserError: another process holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            hint = "Wait until it has ended."
            raise UserError("another process is writing there", where=where, hint=hint) from error
        try:
            yield
        finally:
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()

    def _ends_with_line(self) -> bool:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def as_line(value: Mapping[str, Any]) -> str:
    """Return a value as one line of JSON, characters as they are; halves of surrogate pairs are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text + "\n"
