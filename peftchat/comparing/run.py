"""The comparison from end to end."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftchat.comparing.folder import ComparisonFolder
from peftchat.comparing.outcome import Outcome
from peftchat.comparing.overview import Overview
from peftchat.comparing.plan import Job, Plan
from peftchat.comparing.process import run_python
from peftchat.comparing.record import Measured, Record, read_measured, read_record
from peftchat.comparing.result import Result
from peftchat.comparing.rows import first_questions, settle_rows
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.recipe import dump_recipe

PLAIN_TEXT = Path(__file__).with_name("plain_text.txt")
"""Ordinary prose and a little code, written for this purpose."""


@dataclass(frozen=True)
class Looks:
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


def compare(plan: Plan, out: Path, looks: Looks) -> tuple[Result, ComparisonFolder]:
    """Run everything that is not there yet, and write the results into the folder, which is returned with them.

    Raises:
        InputError: the folder cannot be used, or the data cannot be read.
    """
    folder = ComparisonFolder(out.absolute())
    text = looks.plain_text or PLAIN_TEXT
    if not text.is_file():
        raise UserError("no such file", where=f"--plain-text {text}")
    with folder.claimed(plan.base.recipe), Overview(plan.size) as overview:
        settle_rows(plan.base.recipe, folder)
        work = _Work(plan, folder, overview)
        outcomes = work.searched()
        Result.of(plan, outcomes).write(folder)
        outcomes = work.repeated(outcomes)
        Result.of(plan, outcomes).write(folder)
        questions = looks.questions
        if questions is None:
            questions = first_questions(folder, looks.samples)
        look = _Look(folder, overview, text.absolute(), list(questions), looks.merge)
        outcomes = [replace(outcome, measured=look.at(outcome)) for outcome in outcomes]
        result = Result.of(plan, outcomes, look.at_base() if any(outcome.best for outcome in outcomes) else None)
        result.write(folder)
    return result, folder


class _Work:
    """Trains what is not trained yet."""

    def __init__(self, plan: Plan, folder: ComparisonFolder, overview: Overview) -> None:
        self._plan = plan
        self._folder = folder
        self._overview = overview

    def searched(self) -> list[Outcome]:
        """Every candidate with all settings to try, on the first seed."""
        return [Outcome(candidate, self._tried(Outcome(candidate))) for candidate in self._plan.candidates]

    def repeated(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The best settings of every candidate, on the other seeds."""
        repeats: list[list[Record]] = [[] for _ in outcomes]
        others = self._plan.seeds[1:]
        for outcome in outcomes:
            if outcome.best is None:
                self._overview.skip(len(others))
        for seed in others:
            for place, outcome in enumerate(outcomes):
                if outcome.best is not None:
                    repeats[place].append(self._train(Job(outcome.candidate, outcome.settings, seed)))
        return [replace(outcome, repeats=made) for outcome, made in zip(outcomes, repeats, strict=True)]

    def _tried(self, outcome: Outcome) -> list[Record]:
        records = []
        search = self._plan.search(outcome.candidate)
        while (settings := search.ask()) is not None:
            record = self._train(Job(outcome.candidate, settings, self._plan.seeds[0]))
            search.tell(record.loss if record.failure is None else None)
            records.append(record)
        return records

    def _train(self, job: Job) -> Record:
        run = self._folder.run(job.name)
        text = dump_recipe(self._plan.recipe_of(job, run, self._folder.data))
        file = self._folder.recipe(job.name)
        kept = (run / "run.json").is_file()
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
        if (run / "run.json").is_file():
            record = read_record(job, run)
            # They are many, large, and of no use to a finished run.
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        else:
            record = Record(job, failure=failure)
        self._overview.ended(record, kept=kept)
        return record


class _Look:
    """Measures what is not measured yet; other questions or another text are measured anew."""

    def __init__(
        self, folder: ComparisonFolder, overview: Overview, text: Path, questions: list[str], merge: bool
    ) -> None:
        self._folder = folder
        self._overview = overview
        self._text = text
        self._questions = questions
        self._merge = merge

    def at(self, outcome: Outcome) -> Measured:
        """Measure the best run of a candidate's first seed."""
        if outcome.best is None:
            return Measured()
        name = outcome.best.job.name
        return self._measured(name, outcome.candidate.name, self._folder.run(name))

    def at_base(self) -> float | None:
        """The base's loss on plain text."""
        return self._measured("base", "the base", None).plain_loss

    def _measured(self, name: str, title: str, run: Path | None) -> Measured:
        recipe = self._folder.base if run is None else run / "recipe.yaml"
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
            return read_measured(answered)
        answered.unlink(missing_ok=True)
        write_text(asked, content)
        self._overview.measuring(title)
        arguments = ["peftchat.comparing.measure", str(asked), str(answered)]
        failure = run_python(arguments, self._folder.log(f"{name}.measured"), lambda: None)
        return Measured(failure=failure) if failure is not None else read_measured(answered)
