"""The two consoles: results go to standard output, progress and notes to standard error."""

from typing import NoReturn

from rich.console import Console

from peftchat.streams import BROKEN_PIPE_STATUS, discard_output


class _Console(Console):
    """A console that ends the program quietly when the reader of its pipe has gone."""

    def on_broken_pipe(self) -> NoReturn:
        """End the program; rich would end it with status 1, which here means a failed check."""
        discard_output()
        raise SystemExit(BROKEN_PIPE_STATUS)


stderr = _Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, notes and errors."""

stdout = _Console(highlight=False, soft_wrap=True)
"""Results: tables, answers."""
