"""Atomic file writing: a reader sees the old file or the new one, never a part."""

import os
from pathlib import Path


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a text file under a temporary name, flush it to the disk, and rename it into place.

    Args:
        errors: how to encode characters that UTF-8 cannot represent, as in `open`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
