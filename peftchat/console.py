"""The two consoles: results go to standard output, progress and notes to standard error."""

import os
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from peftchat.library_setup import QUIET
from peftchat.streams import BROKEN_PIPE_STATUS, discard_output

if TYPE_CHECKING:
    from rich.table import Table


class _Console(Console):
    """A console that ends the program quietly when the reader of its pipe has gone."""

    def on_broken_pipe(self) -> NoReturn:
        """End the program; rich would end it with status 1, which here means a failed check."""
        discard_output()
        raise SystemExit(BROKEN_PIPE_STATUS)


stderr = _Console(stderr=True, highlight=False, soft_wrap=True, quiet=QUIET in os.environ)
"""Progress, notes and errors."""

stdout = _Console(highlight=False, soft_wrap=True)
"""Results: tables, answers."""

_UNLIMITED_WIDTH = 400


def print_error(message: str) -> None:
    """Print an error on standard error, also where `--quiet` keeps progress and notes away."""
    _Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="bold red", markup=False)


def natural_width(table: "Table") -> int:
    """Return the width in characters of a table that is not wrapped."""
    return Console(width=_UNLIMITED_WIDTH).measure(table).maximum


def print_table(table: "Table") -> None:
    """Print a table of results as wide as the terminal; a file or a pipe has no limited width."""
    if stdout.is_terminal:
        stdout.print(table, soft_wrap=False)
    else:
        _Console(file=stdout.file, width=max(stdout.width, natural_width(table))).print(table)
