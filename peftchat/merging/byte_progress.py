"""A progress bar in bytes, with rate and time left, on standard error."""

from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from peftchat.console import stderr


class ByteProgress:
    """A bar of written bytes, shown only on a terminal. Use as a context manager."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=stderr,
            disable=not stderr.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> "ByteProgress":
        self._bar.start()
        return self

    def advance(self, count: int) -> None:
        """Advance the bar by `count` bytes."""
        self._bar.advance(self._task, count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
