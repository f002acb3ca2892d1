"""Standard streams: any encoding, closed, full, or a pipe whose reader has gone."""

import codecs
import os
import sys
from contextlib import suppress
from io import TextIOWrapper

BROKEN_PIPE_STATUS = 141
"""Exit status where the reader of a pipe has gone: 128 and the number of SIGPIPE, as of other programs."""

_REPLACE = "peftchat.replace"


def prepare_streams() -> None:
    """Let standard output take any text, and all standard streams exist.

    A character that the encoding of standard output lacks is replaced; Python's standard error escapes it. A stream
    that the caller has closed leads nowhere: otherwise the next file that is opened would get its number, and a library
    that prints would write into that file.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _open_nowhere(number, name)
    codecs.register_error(_REPLACE, _replacement)
    if isinstance(sys.stdout, TextIOWrapper):
        # Under the locale C, Python reads unknown bytes of file names as halves of surrogate pairs.
        sys.stdout.reconfigure(errors=_REPLACE if sys.stdout.errors == "surrogateescape" else "replace")


def check_output() -> str | None:
    """Flush standard output; return why it cannot be written, if so.

    Raises:
        BrokenPipeError: the reader of the pipe has gone.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        discard_output()
        return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return None


def discard_output() -> None:
    """Lead standard output and standard error nowhere, so that the interpreter's last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())


def _open_nowhere(number: int, name: str) -> None:
    mode = "r" if name == "stdin" else "w"
    opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - a descriptor


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write the original bytes of what Python could not decode, and `?` for other characters."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    found = bytes([ord(character) - 0xDC00]) if "\udc80" <= character <= "\udcff" else b"?"
    return found, error.start + 1
