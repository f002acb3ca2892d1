"""Comparison run: train every candidate, evaluate, and write the results.

Each training and each evaluation runs in a process of its own (`run_processes`). Its memory is therefore measured
alone, and its failure ends nothing else. Finished work in the folder is kept, so an interrupted comparison continues
where it stopped.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.comparing.compare_plan import ComparePlan, TrainingJob, check_base_fits, written_format
from peftchat.comparing.compare_progress import CompareProgress
from peftchat.comparing.compare_report import write_comparison_files
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.evaluate import EvaluationRequest
from peftchat.comparing.evidence import read_clusters
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult, read_run_result
from peftchat.comparing.results import ComparisonResult
from peftchat.comparing.run_processes import RunProcesses
from peftchat.comparing.task_scores import TaskAnswers, TaskChoice, TaskRequest, TaskScore
from peftchat.console import stderr
from peftchat.conversation import Conversation
from peftchat.conversations import read_conversations
from peftchat.conversations.dataset_card import SplitCount
from peftchat.conversations.messages_file import ConversationFile
from peftchat.conversations.prepare import atomic_directory
from peftchat.conversations.problems import ProblemLog
from peftchat.conversations.reading import ReadOptions
from peftchat.dataset.cache import conversations
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.output_paths import InputPath, check_output
from peftchat.recipe import dump_recipe, load_recipe
from peftchat.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from peftchat.comparing.candidates import Axis, Settings
    from peftchat.recipe import Recipe


GENERAL_TEXT = Path(__file__).with_name("general_text.txt")
"""Ordinary prose and a little code, written for this purpose."""

_MAX_PROMPT_CHARACTERS = 600
"""Longer prompts do not fit the report."""


@dataclass(frozen=True)
class EvalOptions:
    """Options of the evaluation after training.

    Attributes:
        general_text: the file for the general loss, which shows forgetting; None for the built-in one.
        prompts: prompts that every variant answers; None for the first `num_samples` held-out ones.
        num_samples: how many of those.
        merge: whether to merge each variant and verify the result.
        fork: whether runs may be forks of one process that has imported the libraries.
        tasks: tasks that every finished run and the base are asked; from `check_tasks`.
    """

    general_text: Path | None = None
    prompts: Sequence[str] | None = None
    num_samples: int = 3
    merge: bool = True
    fork: bool = True
    tasks: TaskChoice | None = None


def _check_text(file: Path) -> None:
    """Raise a UserError for a file on which no forgetting can be measured, before any run."""
    where = f"--forgetting-text {file}"
    if not file.is_file():
        raise UserError("no such file", where=where)
    try:
        is_blank = not file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8", where=where, hint="Save the file as UTF-8.") from error
    if is_blank:
        raise UserError("the file holds no text", where=where, hint="Give a file with a few pages of text.")


def compare(plan: ComparePlan, out: Path, options: EvalOptions) -> tuple[ComparisonResult, ComparisonFolder]:
    """Train and evaluate everything that is not finished yet, and write the results.

    Returns:
        The result and its folder.

    Raises:
        UserError: the folder cannot be used, the data cannot be read, or a candidate does not fit the base.
    """
    folder = ComparisonFolder(out.absolute())
    text = options.general_text or GENERAL_TEXT
    _check_text(text)
    inputs = [*plan.base.inputs(), InputPath(text, "the text to measure forgetting on")]
    # The recipe in the folder is the comparison's own, unless the folder holds nothing else of it.
    own = os.path.realpath(folder.base) if folder.is_comparison else None
    check_output(folder.path, [entry for entry in inputs if os.path.realpath(entry.path) != own], f"-o {out}")
    check_base_fits(plan)
    named = "1 candidate" if len(plan.candidates) == 1 else f"{len(plan.candidates)} candidates"
    runs = "1 run" if plan.num_runs == 1 else f"{plan.num_runs} runs"
    message = f"{named}, {runs}, in {out}"
    stderr.print(message, markup=False, highlight=False)
    with (
        folder.locked(plan.base.recipe),
        CompareProgress(plan.num_runs) as progress,
        RunProcesses(fork=options.fork) as processes,
    ):
        write_splits(plan.base.recipe, folder)
        clusters = read_clusters(read_held_out(plan.base.recipe, folder))
        trainer = _RunTrainer(plan, folder, progress, processes)
        candidates = trainer.run_trials()
        write_comparison_files(ComparisonResult.of(plan, candidates, clusters=clusters), folder)
        candidates = trainer.run_seeds(candidates)
        write_comparison_files(ComparisonResult.of(plan, candidates, clusters=clusters), folder)
        prompts = options.prompts
        if prompts is None:
            prompts = first_prompts(read_held_out(plan.base.recipe, folder), options.num_samples)
        evaluator = _RunEvaluator(folder, progress, processes, text.absolute(), tuple(prompts), options.merge)
        candidates = [replace(candidate, evaluation=evaluator.evaluate(candidate)) for candidate in candidates]
        trained = any(candidate.best for candidate in candidates)
        base_loss = evaluator.base_general_loss() if trained else None
        base_tasks: Sequence[TaskScore] = ()
        if trained and options.tasks is not None:
            asker = _TaskAsker(folder, progress, processes, options.tasks)
            candidates = [asker.ask(candidate) for candidate in candidates]
            base_tasks = asker.ask_base()
        result = ComparisonResult.of(plan, candidates, base_loss, clusters, base_tasks)
        write_comparison_files(result, folder)
    return result, folder


def write_splits(recipe: "Recipe", folder: ComparisonFolder) -> None:
    """Write both splits of the recipe's data into the folder, unless they are there.

    All runs read these files: a split by `data.eval_fraction` depends on the seed, which differs between runs.

    Raises:
        UserError: a source cannot be read, or a split is empty.
    """
    if folder.data.is_dir():
        return
    with atomic_directory(folder.data) as draft:
        for split in ("train", "eval"):
            count = SplitCount()
            with ConversationFile(draft / f"{split}.jsonl", count) as file:
                for conversation in conversations(recipe, split, ProblemLog(strict=True)):
                    file.write(conversation)
            if not count.conversations:
                raise UserError(f"the {split} split has no conversations", where="data")


def read_held_out(recipe: "Recipe", folder: ComparisonFolder) -> Iterator[Conversation]:
    """Return what `write_splits` has written as the held-out split."""
    options = ReadOptions(**recipe.answers_read)
    return read_conversations(str(folder.data / "eval.jsonl"), format=written_format(recipe), options=options)


def first_prompts(held_out: Iterable[Conversation], count: int) -> list[str]:
    """Return the first user messages of the first held-out conversations.

    Repeated messages occur once.
    """
    found: dict[str, None] = {}
    for conversation in held_out:
        if len(found) >= count:
            break
        first = next((message.content for message in conversation.messages if message.role == "user"), "")
        if first.strip() and len(first) <= _MAX_PROMPT_CHARACTERS:
            found[first] = None
    return list(found)[:count]


def check_data(failure: str | None, axes: "Sequence[Axis]") -> None:
    """Stop at data that no run can use: all other runs would fail alike.

    Args:
        failure: why a run failed.
        axes: the settings of the comparison.

    Raises:
        UserError: the failure is about the data, which the same settings encode for all runs.
    """
    varied = any(len(axis.values) > 1 and axis.key.startswith(("data.", "chat.")) for axis in axes)
    if failure is not None and failure.startswith(("data.train", "data.eval")) and not varied:
        raise UserError(f"no run can use the data. {failure}", hint="Then compare into another folder (-o).")


class _RunTrainer:
    """Trains the runs that are not finished yet."""

    def __init__(
        self, plan: ComparePlan, folder: ComparisonFolder, progress: CompareProgress, processes: RunProcesses
    ) -> None:
        self._plan = plan
        self._processes = processes
        self._folder = folder
        self._progress = progress
        self._chosen: dict[str, Settings] = {}

    def run_trials(self) -> list[CandidateResult]:
        """Train every candidate with all settings to try, on the first seed."""
        return [
            CandidateResult(candidate, self._trials(CandidateResult(candidate))) for candidate in self._plan.candidates
        ]

    def run_seeds(self, candidates: Sequence[CandidateResult]) -> list[CandidateResult]:
        """Train the best settings of every candidate on the other seeds."""
        seed_runs: list[list[RunResult]] = [[] for _ in candidates]
        other_seeds = self._plan.seeds[1:]
        for candidate in candidates:
            if candidate.best is None:
                self._progress.skip_runs(len(other_seeds))
        for seed in other_seeds:
            for runs, candidate in zip(seed_runs, candidates, strict=True):
                if candidate.best is not None:
                    runs.append(self._train(TrainingJob(candidate.candidate, candidate.settings, seed)))
        return [replace(candidate, seed_runs=runs) for candidate, runs in zip(candidates, seed_runs, strict=True)]

    def _trials(self, candidate: CandidateResult) -> list[RunResult]:
        trials: list[RunResult] = []
        search = self._plan.search(candidate.candidate)
        expected = search.num_trials
        while (settings := search.ask()) is not None:
            result = self._train(TrainingJob(candidate.candidate, settings, self._plan.seeds[0], search.share))
            search.tell(result.loss if result.failure is None else None)
            trials.append(result)
        self._progress.skip_runs(expected - len(trials))
        return trials

    def _train(self, job: TrainingJob) -> RunResult:
        run = RunFolder(self._folder.run(job.name))
        recipe_file = self._folder.recipe(job.name)
        text = self._recipe(job, run, recipe_file)
        kept = run.is_finished
        self._folder.check_unchanged(recipe_file, text, run.path)
        write_text(recipe_file, text)
        failure = None
        if not kept:
            failure = self._processes.run(
                ["peftchat", "train", str(recipe_file), "--resume"],
                self._folder.log(job.name),
                lambda: self._progress.show_run(job, run.path),
            )
        # The summary is written last: a process that fails after it has finished its run.
        if run.is_finished:
            result = read_run_result(job, run.path)
            self._note_choices(job, run)
            # Checkpoints are large, and a finished run does not need them.
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        else:
            result = RunResult(job, failure=failure)
            check_data(failure, self._plan.options.axes)
        self._progress.finish_run(result, kept=kept)
        return result

    def _recipe(self, job: TrainingJob, run: RunFolder, recipe_file: Path) -> str:
        """Return the recipe of a run; a run that has begun goes on with what was left open then."""
        chosen = self._chosen.get(job.candidate.name)
        if chosen and recipe_file.is_file() and run.path.is_dir():
            begun = load_recipe(recipe_file, to_train=False, upgrade=True).recipe
            chosen = None if begun.training.gradient_checkpointing is None else chosen
        return dump_recipe(self._plan.run_recipe(job, run.path, self._folder.data, chosen))

    def _note_choices(self, job: TrainingJob, run: RunFolder) -> None:
        """Keep what a finished run has chosen by its memory plan, which takes longer than a short run of a small model.

        Neither the learning rate nor the seed nor the number of steps affects it.
        """
        shared = self._plan.base.recipe.training
        if shared.gradient_checkpointing is None and shared.global_batch_size is None:
            resolved = load_recipe(run.recipe, to_train=False, upgrade=True).recipe.training.gradient_checkpointing
            self._chosen.setdefault(job.candidate.name, {"training.gradient_checkpointing": resolved})


class _RunEvaluator:
    """Evaluates runs; a result in the folder is kept if its request is the same."""

    def __init__(
        self,
        folder: ComparisonFolder,
        progress: CompareProgress,
        processes: RunProcesses,
        text: Path,
        prompts: tuple[str, ...],
        merge: bool,
    ) -> None:
        self._processes = processes
        self._folder = folder
        self._progress = progress
        self._text = text
        self._prompts = prompts
        self._merge = merge

    def evaluate(self, candidate: CandidateResult) -> Evaluation:
        """Evaluate the best trial of a candidate."""
        if candidate.best is None:
            return Evaluation()
        name = candidate.best.job.name
        return self._evaluate(name, candidate.candidate.name, self._folder.run(name))

    def base_general_loss(self) -> float | None:
        """Return the base model's loss on general text."""
        return self._evaluate("base", "the base model", None).general_loss

    def _evaluate(self, name: str, title: str, run: Path | None) -> Evaluation:
        request = EvaluationRequest(
            run=run,
            recipe=self._folder.base if run is None else RunFolder(run).recipe,
            general_text=self._text,
            general_text_sha256=hashlib.sha256(self._text.read_bytes()).hexdigest(),
            prompts=self._prompts,
            merge=self._merge,
        )
        result_file = self._folder.evaluation(name)
        error = _answer_request(
            request, "peftchat.comparing.evaluate", name, title, self._folder, self._progress, self._processes
        )
        return Evaluation(error=error) if error is not None else Evaluation.read(result_file)


class _TaskAsker:
    """Asks finished runs the tasks; answers in the folder are kept if the request is the same."""

    def __init__(
        self, folder: ComparisonFolder, progress: CompareProgress, processes: RunProcesses, choice: TaskChoice
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._processes = processes
        self._choice = choice

    def ask(self, candidate: CandidateResult) -> CandidateResult:
        """Ask the runs of all seeds; the first one that fails ends it."""
        scores = []
        for run in candidate.runs:
            title = f"{candidate.candidate.name}, seed {run.job.seed}"
            answers = self._ask(run.job.name, title, self._folder.run(run.job.name))
            if answers.error is not None:
                return replace(candidate, task_error=answers.error)
            scores.append(answers.scores)
        return replace(candidate, task_scores=scores)

    def ask_base(self) -> Sequence[TaskScore]:
        """Ask the base; nothing if it cannot be asked."""
        return self._ask("base", "the base model", None).scores

    def _ask(self, name: str, title: str, run: Path | None) -> TaskAnswers:
        request = TaskRequest(
            run=run,
            recipe=self._folder.base if run is None else RunFolder(run).recipe,
            choice=self._choice,
            answers=self._folder.answers,
        )
        module, name = "peftchat.comparing.task_scores", f"{name}.tasks"
        title = f"{title} on {', '.join(self._choice.tasks)}"
        error = _answer_request(request, module, name, title, self._folder, self._progress, self._processes)
        return TaskAnswers(error=error) if error is not None else TaskAnswers.read(self._folder.evaluation(name))


def _answer_request(
    request: EvaluationRequest | TaskRequest,
    module: str,
    name: str,
    title: str,
    folder: ComparisonFolder,
    progress: CompareProgress,
    processes: RunProcesses,
) -> str | None:
    """Have a request answered by a module in a process of its own, unless the folder has the answer.

    Returns:
        None if there is an answer, else why there is none, in one line.
    """
    request_file, result_file = folder.evaluation(f"{name}.request"), folder.evaluation(name)
    content = request.model_dump_json(indent=2) + "\n"
    unchanged = request_file.is_file() and request_file.read_text(encoding="utf-8") == content
    if result_file.is_file() and unchanged:
        return None
    result_file.unlink(missing_ok=True)
    write_text(request_file, content)
    progress.start_evaluation(title)
    return processes.run([module, str(request_file), str(result_file)], folder.log(f"{name}.evaluation"), lambda: None)
