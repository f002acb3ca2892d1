"""Progress of a comparison: a live display, or one line per run.

The display is live on a terminal only.
"""

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
from peftchat.formatting import format_clock, format_decimal, format_duration, format_percent
from peftchat.runs.run_folder import RunFolder


class CompareProgress:
    """Progress display of a comparison; use it as a context manager.

    Args:
        total: the number of runs if none fails.
        console: where to print.
    """

    def __init__(self, total: int, console: Console = stderr) -> None:
        self._total = total
        self._console = console
        self._done = 0
        self._trained_here = 0
        self._started = time.monotonic()
        self._current = Text("")
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render) if live else None

    def __enter__(self) -> "CompareProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show_run(self, job: TrainingJob, run: Path) -> None:
        """Show the step and loss of the current run."""
        if self._live is None:
            return
        metrics = ""
        try:
            lines = RunFolder(run).metrics.read()
        except UserError:
            lines = []
        for line in reversed(lines):
            if line.get("loss") is not None:
                metrics = f"step {line['step']}, loss {format_decimal(line['loss'])}"  # type: ignore[arg-type]
                break
        self._current = Text.assemble((_title(job), "bold"), "  ", (metrics or "starting", "dim"))

    def start_evaluation(self, title: str) -> None:
        """Show that a finished run is being evaluated."""
        self._current = Text.assemble((title, "bold"), "  ", ("evaluating", "dim"))
        if self._live is None:
            self._console.print(f"evaluating {title}", markup=False)

    def finish_run(self, result: RunResult, *, kept: bool) -> None:
        """Count a run and print its result; a `kept` run was finished before this start."""
        self._done += 1
        self._trained_here += not kept
        counter = f"{self._done:>{len(str(self._total))}}/{self._total}"
        if result.failure is not None:
            self._console.print(
                Text.assemble(f"{counter}  {_title(result.job)}  ", ("failed: ", "red"), result.failure), soft_wrap=True
            )
            return
        time_taken = "already finished" if kept else f"trained {format_duration(result.seconds)}"
        left = self._seconds_left()
        self._console.print(
            Text.assemble(
                f"{counter}  {_title(result.job)}  held-out loss ",
                (format_decimal(result.loss), "bold"),
                "" if result.own_right is None else f", {format_percent(result.own_right)} right",
                (f"  {time_taken}" + (f", {format_clock(left)} left" if left else ""), "dim"),
            ),
            soft_wrap=True,
        )

    def skip_runs(self, runs: int) -> None:
        """Subtract runs that will not start from the total; a negative number adds some."""
        self._total -= runs

    def _seconds_left(self) -> float | None:
        if not self._trained_here:
            return None
        return (time.monotonic() - self._started) / self._trained_here * (self._total - self._done)

    def _render(self) -> Group:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(ratio=1)
        row.add_column(justify="right")
        row.add_column(justify="right")
        left = self._seconds_left()
        row.add_row(
            ProgressBar(total=max(1, self._total), completed=self._done),
            f"run {min(self._done + 1, self._total)} of {self._total}",
            f"{format_clock(left)} left" if left else "",
        )
        return Group(row, self._current)


def _title(job: TrainingJob) -> str:
    short = f", {1 / job.share:.3g} times shorter" if job.share < 1 else ""
    return f"{job.candidate.name}, {describe(job.settings)}, seed {job.seed}{short}"
