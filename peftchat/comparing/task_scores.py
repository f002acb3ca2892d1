"""Tasks of EleutherAI's harness asked of a finished run, or of the base, in a child process.

`python -m peftchat.comparing.task_scores REQUEST RESULT` answers a request with the score of every question, from which
`task_evidence` makes paired differences.
"""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict

from peftchat.child_process import end_with_parent
from peftchat.errors import UserError, VerificationError
from peftchat.files import write_text
from peftchat.library_setup import prepare_libraries

if TYPE_CHECKING:
    from peftchat.evaluating.evaluated_model import EvaluatedModel
    from peftchat.evaluating.harness import TaskScores
    from peftchat.evaluating.task_catalog import ChosenTask

_PREFERRED_METRIC = "acc_norm"
"""What the leaderboard of 2023 shows of tasks that have it; of others, the first metric counts."""


class TaskChoice(BaseModel):
    """The tasks of a comparison.

    Attributes:
        tasks: `NAME[@SHOTS]` or `FILE.yaml[@SHOTS]`.
        limit: the most questions of each.
        sha256: digest of their questions and settings, so that changed ones are asked again.
    """

    model_config = ConfigDict(frozen=True)

    tasks: tuple[str, ...]
    limit: int | None = None
    sha256: str = ""


class TaskRequest(BaseModel):
    """What to ask of whom; two equal requests have the same result.

    Attributes:
        run: the run folder; None for the base model.
        recipe: the recipe file of the run.
        choice: the tasks.
        answers: the folder in which answers are kept, so that an interrupted comparison goes on.
    """

    model_config = ConfigDict(frozen=True)

    run: Path | None
    recipe: Path
    choice: TaskChoice
    answers: Path


class TaskScore(BaseModel):
    """The score of one model on one task.

    Attributes:
        task: its name.
        metric: the metric that counts.
        higher_is_better: its direction.
        shots: examples before each question; None for a group whose tasks differ.
        values: of each question.
        weights: of each question in the mean; the tasks of a group may count alike whatever their size.
        clusters: the group of related questions that each belongs to; empty where each stands alone.
        ids: a digest of each question.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    higher_is_better: bool
    shots: int | None
    values: tuple[float, ...]
    weights: tuple[float, ...]
    clusters: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


class TaskAnswers(BaseModel):
    """What one model reached on all tasks.

    Attributes:
        error: why it could not be asked.
        scores: one for each task.
    """

    model_config = ConfigDict(frozen=True)

    error: str | None = None
    scores: tuple[TaskScore, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what the child process wrote."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_text(path, self.model_dump_json() + "\n")


def check_tasks(texts: Sequence[str], limit: int | None = None) -> TaskChoice:
    """Load all tasks with their data, before anything is trained.

    Args:
        texts: `NAME[@SHOTS]` or `FILE.yaml[@SHOTS]`, also several separated by commas.
        limit: the most questions of each.

    Raises:
        UserError: the harness is missing, a task is unknown or has no score by question, or its data is not here.
    """
    from peftchat.evaluating.task_catalog import require_harness
    from peftchat.evaluating.task_files import load_named_tasks, parse_named_tasks

    require_harness()
    chosen = load_named_tasks(parse_named_tasks(texts))
    digest = hashlib.sha256()
    for one in chosen:
        for name, task in one.tasks.items():
            better = task.higher_is_better()
            counted = [metric for metric, how in task.aggregation().items() if _is_mean(how)]
            if not any(better.get(metric) is not None for metric in counted):
                found = ", ".join(task.aggregation())
                raise UserError(
                    f"no metric of the task is a mean over its questions with a direction; it has {found}",
                    where=f"--tasks {name}",
                    hint="Differences are paired by question: choose another task.",
                )
            digest.update(json.dumps([name, task.dump_config()], sort_keys=True, default=str).encode())
            for question in task.eval_docs:
                digest.update(json.dumps(question, sort_keys=True, default=str).encode())
    parts = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
    return TaskChoice(tasks=parts, limit=limit, sha256=digest.hexdigest())


def _is_mean(aggregation: Any) -> bool:
    from lm_eval.api.metrics import mean

    return aggregation is mean


def ask_tasks(request: TaskRequest) -> TaskAnswers:
    """Ask one model all tasks.

    Raises:
        UserError: the model or a task cannot be used.
        VerificationError: the model computes no numbers.
    """
    from peftchat.evaluating.harness import AskOptions, score_model
    from peftchat.evaluating.task_files import load_named_tasks, parse_named_tasks

    model = _model(request)
    tasks = load_named_tasks(parse_named_tasks(request.choice.tasks))
    # One file for each model: answers belong to its files.
    answers = request.answers / f"{model.key()}.jsonl"
    found = score_model(model, tasks, AskOptions(limit=request.choice.limit), answers)
    return TaskAnswers(scores=tuple(scores_of(found.scores, tasks)))


def _model(request: TaskRequest) -> "EvaluatedModel":
    from peftchat.evaluating.evaluated_model import EvaluatedModel
    from peftchat.models.source import ModelSource
    from peftchat.recipe import load_recipe

    if request.run is not None:
        return EvaluatedModel.open(str(request.run))
    recipe = load_recipe(request.recipe, to_train=False, upgrade=True).recipe
    return EvaluatedModel("base", ModelSource.of_recipe(recipe), recipe, is_base=True)


def scores_of(scores: "Mapping[str, TaskScores]", chosen: "Iterable[ChosenTask]") -> list[TaskScore]:
    """Return the score of each task that was asked for; a group is one, and the tasks of a tag are several."""
    found = []
    for one in chosen:
        group = scores.get(one.name)
        if group is not None and group.members:
            parts = [scores[member] for member in group.members]
            key = _metric(parts)
            weighted = key in group.weighted or key.partition(",")[0] in group.weighted
            found.append(_score(one.name, key, parts, group.shots, weighted=weighted))
        else:
            found += [_score(name, _metric([scores[name]]), [scores[name]], scores[name].shots) for name in one.tasks]
    return found


def _metric(parts: "Sequence[TaskScores]") -> str:
    """Return the key of the metric that counts, of those that all parts have by question."""
    first, *others = parts
    keys = [
        key
        for key, score in first.metrics.items()
        if score.higher_is_better is not None
        and all(key in part.metrics and part.metrics[key].by_question is not None for part in (first, *others))
    ]
    if not keys:
        names = ", ".join(part.task for part in parts)
        raise UserError(f"the tasks have no metric by question in common: {names}", where="--tasks")
    return next((key for key in keys if key.partition(",")[0] == _PREFERRED_METRIC), keys[0])


def _score(
    name: str, key: str, parts: "Sequence[TaskScores]", shots: int | None, *, weighted: bool = True
) -> TaskScore:
    values: list[float] = []
    weights: list[float] = []
    clusters: list[str] = []
    ids: list[str] = []
    related = any(part.clusters is not None for part in parts)
    for part in parts:
        of_part = part.metrics[key].by_question
        assert of_part is not None
        values += of_part
        weights += [1.0 if weighted else 1.0 / len(of_part)] * len(of_part)
        own = part.clusters if part.clusters is not None else tuple(range(len(of_part)))
        clusters += [f"{part.task}:{cluster}" for cluster in own] if related else []
        ids += [f"{part.task}:{one}" for one in part.ids]
    if not all(map(math.isfinite, values)):
        raise VerificationError(f"task {name}: {key} is not a number for some questions")
    metric, _, of_filter = key.partition(",")
    better = parts[0].metrics[key].higher_is_better
    assert better is not None
    return TaskScore(
        task=name,
        metric=metric if of_filter in ("", "none") else f"{metric} ({of_filter})",
        higher_is_better=better,
        shots=shots,
        values=tuple(values),
        weights=tuple(weights),
        clusters=tuple(clusters),
        ids=tuple(ids),
    )


def main(request: Path, result: Path) -> None:
    """Answer the request file, and write the result file."""
    prepare_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        answers = ask_tasks(TaskRequest.model_validate_json(request.read_text(encoding="utf-8")))
    answers.write(result)


if __name__ == "__main__":
    end_with_parent()
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (UserError, VerificationError) as error:
        sys.exit(f"Error: {error}")
