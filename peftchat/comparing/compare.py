"""A process of its own for each run: its memory is its own, and so is its end."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from peftchat.comparing.compare_plan import ComparePlan, TrainingJob
from peftchat.comparing.compare_progress import CompareProgress
from peftchat.comparing.compare_report import write_comparison_files
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult, read_evaluation, read_run_result
from peftchat.comparing.results import ComparisonResult
from peftchat.conversations.dataset_card import SplitCount
from peftchat.conversations.prepare import ConversationFile, atomic_directory
from peftchat.conversations.problems import ProblemLog
from peftchat.dataset.cache import conversations
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.recipe import dump_recipe
from peftchat.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


_LOOK_EVERY = 0.5
_PATIENCE = 30.0
_NO_COLOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def run_python(arguments: Sequence[str], log: Path, watch: Callable[[], None]) -> str | None:
    """Run `python -m ARGUMENTS` to its end, all that it says going to `log`.

    Args:
        watch: called about twice a second while the process runs.

    Returns:
        None if it ended well, else the reason in one line.
    """
    _end_leftover(log)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    note = _pid_file(log)
    write_text(note, f"{process.pid} {psutil.Process(process.pid).create_time()}")
    try:
        while process.poll() is None:
            watch()
            time.sleep(_LOOK_EVERY)
    finally:
        if process.poll() is None:
            _end(psutil.Process(process.pid))
            process.wait()
        note.unlink(missing_ok=True)
    return None if process.returncode == 0 else _reason(process.returncode, log)


def _pid_file(log: Path) -> Path:
    return log.with_suffix(".pid")


def _end_leftover(log: Path) -> None:
    """End the process of an earlier start that was killed itself: two must not write one run."""
    note = _pid_file(log)
    if not note.is_file():
        return
    pid, _, born = note.read_text(encoding="utf-8").partition(" ")
    with suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid))
        # The number may belong to another process by now.
        if f"{process.create_time()}" == born:
            _end(process)
    note.unlink()


def _end(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        family = [*process.children(recursive=True), process]
        for one in family:
            one.terminate()
        _, alive = psutil.wait_procs(family, timeout=_PATIENCE)
        for one in alive:
            one.kill()


def _reason(status: int, log: Path) -> str:
    if status < 0:
        return f"ended by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    lines = _NO_COLOR.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()
    for line in reversed(lines):
        for mark in ("Error: ", "Failed: "):
            if line.startswith(mark):
                return line.removeprefix(mark)
    # A traceback ends with the exception.
    return next((line.strip() for line in reversed(lines) if line.strip()), f"ended with status {status}")


def write_splits(recipe: "Recipe", folder: ComparisonFolder) -> None:
    """Write both sides of the recipe's data into the folder, unless they lie there.

    A recipe that holds out a share of its rows chooses them by its seed, which differs between the runs.

    Raises:
        UserError: a source cannot be read, or leaves one side empty.
    """
    if folder.data.is_dir():
        return
    with atomic_directory(folder.data) as draft:
        for side in ("train", "eval"):
            count = SplitCount()
            with ConversationFile(draft / f"{side}.jsonl", count) as file:
                for conversation in conversations(recipe, side, ProblemLog(strict=True)):
                    file.write(conversation)
            if not count.conversations:
                raise UserError(
                    f"no conversation is left to {'train' if side == 'train' else 'evaluate'} on", where="data"
                )


def first_questions(folder: ComparisonFolder, count: int) -> list[str]:
    """The first user message of the first held-out conversations, none twice."""
    from peftchat.conversations import read_conversations

    found: dict[str, None] = {}
    for conversation in read_conversations(str(folder.data / "eval.jsonl"), format="messages"):
        if len(found) >= count:
            break
        first = next((message.content for message in conversation.messages if message.role == "user"), "")
        if first.strip() and len(first) <= _LONGEST:
            found[first] = None
    return list(found)[:count]


_LONGEST = 600
"""Characters of a question that still suits a table."""


PLAIN_TEXT = Path(__file__).with_name("plain_text.txt")
"""Ordinary prose and a little code, written for this purpose."""


@dataclass(frozen=True)
class EvalOptions:
    """What is looked at when the runs have ended.

    Attributes:
        plain_text: the file that forgetting is measured on; None for the one that comes along.
        questions: prompts that every variant answers; None for the first `samples` of the held-out ones.
        samples: how many of those.
        merge: merge each variant and prove it.
    """

    plain_text: Path | None = None
    questions: Sequence[str] | None = None
    samples: int = 3
    merge: bool = True


def compare(plan: ComparePlan, out: Path, looks: EvalOptions) -> tuple[ComparisonResult, ComparisonFolder]:
    """Run everything that is not there yet, and write the results into the folder, which is returned with them.

    Raises:
        UserError: the folder cannot be used, or the data cannot be read.
    """
    folder = ComparisonFolder(out.absolute())
    text = looks.plain_text or PLAIN_TEXT
    if not text.is_file():
        raise UserError("no such file", where=f"--plain-text {text}")
    with folder.claimed(plan.base.recipe), CompareProgress(plan.size) as overview:
        write_splits(plan.base.recipe, folder)
        work = _Work(plan, folder, overview)
        outcomes = work.searched()
        write_comparison_files(ComparisonResult.of(plan, outcomes), folder)
        outcomes = work.repeated(outcomes)
        write_comparison_files(ComparisonResult.of(plan, outcomes), folder)
        questions = looks.questions
        if questions is None:
            questions = first_questions(folder, looks.samples)
        look = _Evaluate(folder, overview, text.absolute(), list(questions), looks.merge)
        outcomes = [replace(outcome, measured=look.at(outcome)) for outcome in outcomes]
        result = ComparisonResult.of(
            plan, outcomes, look.at_base() if any(outcome.best for outcome in outcomes) else None
        )
        write_comparison_files(result, folder)
    return result, folder


class _Work:
    """Trains what is not trained yet."""

    def __init__(self, plan: ComparePlan, folder: ComparisonFolder, overview: CompareProgress) -> None:
        self._plan = plan
        self._folder = folder
        self._overview = overview

    def searched(self) -> list[CandidateResult]:
        """Every candidate with all settings to try, on the first seed."""
        return [
            CandidateResult(candidate, self._tried(CandidateResult(candidate))) for candidate in self._plan.candidates
        ]

    def repeated(self, outcomes: Sequence[CandidateResult]) -> list[CandidateResult]:
        """The best settings of every candidate, on the other seeds."""
        repeats: list[list[RunResult]] = [[] for _ in outcomes]
        others = self._plan.seeds[1:]
        for outcome in outcomes:
            if outcome.best is None:
                self._overview.skip(len(others))
        for seed in others:
            for place, outcome in enumerate(outcomes):
                if outcome.best is not None:
                    repeats[place].append(self._train(TrainingJob(outcome.candidate, outcome.settings, seed)))
        return [replace(outcome, repeats=made) for outcome, made in zip(outcomes, repeats, strict=True)]

    def _tried(self, outcome: CandidateResult) -> list[RunResult]:
        records = []
        search = self._plan.search(outcome.candidate)
        while (settings := search.ask()) is not None:
            record = self._train(TrainingJob(outcome.candidate, settings, self._plan.seeds[0]))
            search.tell(record.loss if record.failure is None else None)
            records.append(record)
        return records

    def _train(self, job: TrainingJob) -> RunResult:
        run = self._folder.run(job.name)
        text = dump_recipe(self._plan.recipe_of(job, run, self._folder.data))
        file = self._folder.recipe(job.name)
        kept = RunFolder(run).is_finished
        self._folder.check_unchanged(file, text, run)
        write_text(file, text)
        failure = None
        if not kept:
            failure = run_python(
                ["peftchat", "train", str(file), "--resume"],
                self._folder.log(job.name),
                lambda: self._overview.watch(job, run),
            )
        # It is written when everything else is: what went wrong after it does not touch the run.
        if RunFolder(run).is_finished:
            record = read_run_result(job, run)
            # They are many, large, and of no use to a finished run.
            shutil.rmtree(RunFolder(run).checkpoints, ignore_errors=True)
        else:
            record = RunResult(job, failure=failure)
        self._overview.ended(record, kept=kept)
        return record


class _Evaluate:
    """Measures what is not measured yet; other questions or another text are measured anew."""

    def __init__(
        self, folder: ComparisonFolder, overview: CompareProgress, text: Path, questions: list[str], merge: bool
    ) -> None:
        self._folder = folder
        self._overview = overview
        self._text = text
        self._questions = questions
        self._merge = merge

    def at(self, outcome: CandidateResult) -> Evaluation:
        """Measure the best run of a candidate's first seed."""
        if outcome.best is None:
            return Evaluation()
        name = outcome.best.job.name
        return self._measured(name, outcome.candidate.name, self._folder.run(name))

    def at_base(self) -> float | None:
        """The base's loss on plain text."""
        return self._measured("base", "the base", None).plain_loss

    def _measured(self, name: str, title: str, run: Path | None) -> Evaluation:
        recipe = self._folder.base if run is None else RunFolder(run).recipe
        request = {
            "run": None if run is None else str(run),
            "recipe": str(recipe),
            "text": str(self._text),
            "digest": hashlib.sha256(self._text.read_bytes()).hexdigest(),
            "questions": self._questions,
            "merge": self._merge,
        }
        asked, answered = self._folder.measured(f"{name}.request"), self._folder.measured(name)
        content = json.dumps(request, indent=2) + "\n"
        if answered.is_file() and asked.is_file() and asked.read_text(encoding="utf-8") == content:
            return read_evaluation(answered)
        answered.unlink(missing_ok=True)
        write_text(asked, content)
        self._overview.measuring(title)
        arguments = ["peftchat.comparing.evaluate", str(asked), str(answered)]
        failure = run_python(arguments, self._folder.log(f"{name}.measured"), lambda: None)
        return Evaluation(failure=failure) if failure is not None else read_evaluation(answered)
