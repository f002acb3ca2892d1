"""Where each text was seen first, kept on disk: memory does not grow with the number of dialogues."""

import sqlite3
from pathlib import Path
from typing import NamedTuple

_CACHE_KIB = 32 * 1024


class Sighting(NamedTuple):
    """A dialogue and the part that it is in.

    Attributes:
        part: number of the part.
        where: `file:line`.
    """

    part: int
    where: str


class Sightings:
    """The first occurrence of each key in each part.

    Args:
        file: where to keep them; whoever gives it removes it.
    """

    def __init__(self, file: Path) -> None:
        self._base = sqlite3.connect(file, isolation_level=None)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA synchronous = OFF")
        self._base.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._base.execute(
            "CREATE TABLE seen (key BLOB, part INTEGER, place BLOB, PRIMARY KEY (key, part)) WITHOUT ROWID"
        )
        self._base.execute("BEGIN")

    def see(self, key: bytes, part: int, where: str) -> dict[int, str]:
        """Note an occurrence; returns where the key was seen first before, by part."""
        rows = self._base.execute("SELECT part, place FROM seen WHERE key = ?", (key,)).fetchall()
        earlier = {number: place.decode(errors="surrogateescape") for number, place in rows}
        if part not in earlier:
            # Paths may hold bytes that are not UTF-8, as lone surrogates.
            place = where.encode(errors="surrogateescape")
            self._base.execute("INSERT INTO seen VALUES (?, ?, ?)", (key, part, place))
        return earlier

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()
