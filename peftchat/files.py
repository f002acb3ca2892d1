"""Atomic file writing (a reader sees the old file or the new one, never a part), and the cache folder."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from peftchat.errors import UserError

APPEARS_SECONDS = 60.0
"""How long a new file of another machine may stay unseen: NFS keeps what it knows of a folder so long (`acdirmax`)."""

_POLL_SECONDS = 0.2


def cache_root() -> Path:
    """Return the cache folder: `PEFTCHAT_CACHE`, or the user's cache folder.

    Raises:
        FileNotFoundError: the user has no home folder, as in a container that runs under a number without a name.
    """
    if own := os.environ.get("PEFTCHAT_CACHE"):
        return Path(own)
    users = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # By the XDG specification, an empty or a relative path counts as none.
    if users.is_absolute():
        return users / "peftchat"
    try:
        return Path.home() / ".cache" / "peftchat"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "the user has no home folder") from error


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


def appears(path: Path) -> bool:
    """Return whether a file that another machine has written is here, or comes to be seen here within a minute."""
    end = time.monotonic() + APPEARS_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
        for folder in (path.parent.parent, path.parent):
            # Opening a folder makes a network file system look at the server.
            with suppress(OSError):
                next(folder.iterdir(), None)
    return True


def write_new_text(path: Path, text: str) -> None:
    """Write a text file whose name nothing has; nothing stays of one that cannot be written.

    Raises:
        UserError: the name is taken, or the file cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except BaseException:
                path.unlink()
                raise
    except FileExistsError as error:
        raise UserError("the file already exists", where=str(path), hint="Choose another name with `-o`.") from error
    except OSError as error:
        hint = "Check that its folder is there, and that you may write to it."
        raise UserError(f"the file cannot be written: {error.strerror}", where=str(path), hint=hint) from error
