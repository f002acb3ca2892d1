"""Which dialogues were there before, in memory that does not grow with their number."""

import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Self

_CACHE_KIB = 32 * 1024


class SeenDialogues:
    """A set of fingerprints on disk: a million of them cost a Python set 100 MB, and this its page cache.

    Args:
        file: where to keep it; removed at the end.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._base = sqlite3.connect(file, isolation_level=None)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA synchronous = OFF")
        self._base.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._base.execute("CREATE TABLE seen (fingerprint BLOB PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def add(self, fingerprint: bytes) -> bool:
        """Remember a fingerprint; True if it was new."""
        return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (fingerprint,)).rowcount > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()
        self._file.unlink(missing_ok=True)
