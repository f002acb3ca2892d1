"""What is shown while a comparison runs: on a terminal in place, elsewhere a line a run."""

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peftchat.comparing.candidates import describe
from peftchat.comparing.compare_plan import TrainingJob
from peftchat.comparing.outcomes import RunResult
from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.formatting import format_clock, format_decimal, format_duration
from peftchat.runs.run_folder import RunFolder


class CompareProgress:
    """Counts runs and tells which one is on. Use as a context manager.

    Args:
        total: runs if none fails.
        console: where to show it.
    """

    def __init__(self, total: int, console: Console = stderr) -> None:
        self._total = total
        self._console = console
        self._done = 0
        self._made_here = 0
        self._began = time.monotonic()
        self._now = Text("")
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render) if live else None

    def __enter__(self) -> "CompareProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, job: TrainingJob, run: Path) -> None:
        """Show where a run that is going on has got to."""
        if self._live is None:
            return
        readings = ""
        try:
            lines = RunFolder(run).metrics.read()
        except UserError:
            lines = []
        for line in reversed(lines):
            if line.get("loss") is not None:
                readings = f"step {line['step']}, loss {format_decimal(line['loss'])}"  # type: ignore[arg-type]
                break
        self._now = Text.assemble((_title(job), "bold"), "  ", (readings or "starting", "dim"))

    def measuring(self, what: str) -> None:
        """Show that a finished run is looked at."""
        self._now = Text.assemble((what, "bold"), "  ", ("measuring", "dim"))
        if self._live is None:
            self._console.print(f"measuring {what}", markup=False)

    def ended(self, record: RunResult, *, kept: bool) -> None:
        """Count a run and print its result; `kept` ones were there from an earlier start."""
        self._done += 1
        self._made_here += not kept
        place = f"{self._done:>{len(str(self._total))}}/{self._total}"
        if record.failure is not None:
            self._console.print(
                Text.assemble(f"{place}  {_title(record.job)}  ", ("failed: ", "red"), record.failure), soft_wrap=True
            )
            return
        taken = "kept from before" if kept else f"trained {format_duration(record.seconds)}"
        left = self._left()
        self._console.print(
            Text.assemble(
                f"{place}  {_title(record.job)}  held-out loss ",
                (format_decimal(record.loss), "bold"),
                (f"  {taken}" + (f", {format_clock(left)} left" if left else ""), "dim"),
            ),
            soft_wrap=True,
        )

    def skip(self, runs: int) -> None:
        """Take runs off the total that will not take place."""
        self._total -= runs

    def _left(self) -> float | None:
        if not self._made_here:
            return None
        return (time.monotonic() - self._began) / self._made_here * (self._total - self._done)

    def _render(self) -> Group:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_column(justify="right")
        left = self._left()
        row.add_row(
            ProgressBar(total=max(1, self._total), completed=self._done),
            f"run {min(self._done + 1, self._total)} of {self._total}",
            f"{format_clock(left)} left" if left else "",
        )
        return Group(row, self._now)


def _title(job: TrainingJob) -> str:
    return f"{job.candidate.name}, {describe(job.settings)}, seed {job.seed}"
