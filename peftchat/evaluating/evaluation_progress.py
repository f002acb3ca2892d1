"""Progress of an evaluation on standard error: a live line on a terminal, else a line now and then."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from peftchat.console import stderr
from peftchat.evaluating.evaluated_model import EvaluatedModel
from peftchat.evaluating.harness import TaskScores
from peftchat.evaluating.run_evaluation import Watch
from peftchat.formatting import format_count

if TYPE_CHECKING:
    from rich.status import Status

_LIVE_SECONDS = 0.2
_LINE_SECONDS = 15.0


class EvaluationProgress:
    """Shows the task, the answers so far and their rate. Use it as a context manager.

    Args:
        clock: seconds since some moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live = stderr.is_terminal and not stderr.is_dumb_terminal
        self._status: Status | None = None
        self._title = ""
        self._answers = 0
        self._started = self._shown = clock()

    @property
    def watch(self) -> Watch:
        """What an evaluation calls."""
        return Watch(self._on_model, self._on_task, self._on_answer, self._on_finished)

    def __enter__(self) -> Self:
        if self._live:
            self._status = stderr.status("loading …")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def _on_model(self, model: EvaluatedModel) -> None:
        self._say(f"evaluating {model.name}")

    def _on_task(self, task: str) -> None:
        self._title = task
        self._answers = 0
        self._started = self._shown = self._clock()
        if self._status is not None:
            self._status.update(f"{task} …")

    def _on_answer(self, count: int) -> None:
        self._answers += count
        now = self._clock()
        if now - self._shown < (_LIVE_SECONDS if self._live else _LINE_SECONDS):
            return
        self._shown = now
        rate = self._answers / max(1e-9, now - self._started)
        answers = "answer" if self._answers == 1 else "answers"
        text = f"{self._title}: {format_count(self._answers)} {answers}, {rate:,.1f} per second"
        if self._status is not None:
            self._status.update(text)
        else:
            self._say(f"  {text}")

    def _on_finished(self, scores: TaskScores) -> None:
        if scores.task != scores.asked:
            return
        values = ", ".join(f"{key.partition(',')[0]} {score.value:.3f}" for key, score in scores.metrics.items())
        self._say(f"  {scores.task}: {values}")

    def _say(self, text: str) -> None:
        stderr.print(text, markup=False, highlight=False)
