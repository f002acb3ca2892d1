"""A row as it comes out of a file, before anyone knows what it means."""

import json
from typing import Any, NamedTuple

MAX_ROW_BYTES = 16 * 2**20
"""Default limit for one row: a dialogue of 16 MiB is a broken file, not a dialogue."""


class Row(NamedTuple):
    """One JSON object or table row.

    Attributes:
        where: `file:line` or `file:element`, from 1.
        value: the fields.
        raw: the bytes it was read from, None for tables.
    """

    where: str
    value: dict[str, Any]
    raw: bytes | None

    def as_bytes(self) -> bytes:
        """What a quarantine file shows of the row: its bytes, or its fields as JSON where it came from a table."""
        if self.raw is not None:
            return self.raw
        return json.dumps(self.value, default=str).encode()
