"""Scores of several models on the same questions, side by side, with the paired difference of the first and each other.

The result is what `results.json` holds; every report is made from it.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftchat.errors import VerificationError
from peftchat.evaluating.harness import MetricScore, ModelScores, TaskScores
from peftchat.evaluating.paired import Difference, mean_difference, paired_difference, standard_error
from peftchat.files import write_text


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model of an evaluation.

    Attributes:
        name: what reports call it.
        model: its folder or hub id.
        base: that of an adapter; None for a complete model.
        precision: the dtype and the quantization that it was loaded with, in words.
        through_template: whether it was asked through its chat template.
        device: where it ran.
        dtype: what it computed in.
        context: tokens of its context.
        batch_sizes: the batches that were found or given.
        cut: requests whose beginning did not fit into its context.
        requests: all requests.
        key: the digest of its files.
    """

    name: str
    model: str
    base: str | None
    precision: str
    through_template: bool
    device: str
    dtype: str
    context: int
    batch_sizes: tuple[int, ...]
    cut: int
    requests: int
    key: str


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A metric of a task for all models.

    Attributes:
        metric: its name, with the harness's filter where it has one.
        higher_is_better: None where the task does not say.
        values: of each model, in the order of the models.
        stderrs: their standard errors: the harness's, or over clusters of related questions.
        differences: the first model minus each other one; None where the metric is not a mean over questions.
    """

    metric: str
    higher_is_better: bool | None
    values: tuple[float, ...]
    stderrs: tuple[float | None, ...]
    differences: tuple[Difference | None, ...]

    def verdict(self, place: int) -> str:
        """Return what the interval says about the first model beside another one, in words.

        Args:
            place: of the other model among the others.
        """
        difference = self.differences[place]
        if difference is None or difference.low is None:
            return "no interval"
        if not difference.excludes_zero:
            return "not told apart"
        if self.higher_is_better is None:
            return "higher" if difference.mean > 0 else "lower"
        return "better" if (difference.mean > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task or a group for all models.

    Attributes:
        task: its name.
        asked: the name that was asked for.
        shots: examples before each question; None for a group whose tasks differ.
        version: the version of the task.
        questions: how many were asked.
        available: how many the task has.
        clusters: groups of related questions; None where each question stands alone.
        members: the tasks of a group; empty for a task.
        dataset: the hub id of its data; None for local files.
        metrics: its metrics.
    """

    task: str
    asked: str
    shots: int | None
    version: str | None
    questions: int
    available: int
    clusters: int | None
    members: tuple[str, ...]
    dataset: str | None
    metrics: tuple[MetricRow, ...]

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a group that was asked for."""
        return self.task != self.asked


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        models: the evaluated model first, then those that it is compared with.
        tasks: tasks, and groups after their tasks.
        settings: what was asked for, and the versions of the libraries.
    """

    models: tuple[ModelRow, ...]
    tasks: tuple[TaskRow, ...]
    settings: Mapping[str, Any]

    @property
    def shown(self) -> tuple[TaskRow, ...]:
        """The tasks of the table: a group stands for its parts."""
        groups = {task.task for task in self.tasks if task.members}
        return tuple(task for task in self.tasks if not task.is_part or task.asked not in groups)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, with the verdicts in words."""
        found = asdict(self)
        for task, row in zip(found["tasks"], self.tasks, strict=True):
            for metric, of_metric in zip(task["metrics"], row.metrics, strict=True):
                metric["verdicts"] = [of_metric.verdict(place) for place in range(len(of_metric.differences))]
        return found

    def write(self, path: Path) -> None:
        """Write `results.json`."""
        write_text(path, json.dumps(self.as_dict(), indent=2) + "\n")


def side_by_side(scores: Sequence[ModelScores]) -> tuple[TaskRow, ...]:
    """Return the scores of all models by task, with the differences.

    Args:
        scores: of the evaluated model first; all of the same tasks.

    Raises:
        VerificationError: the models were asked different questions.
    """
    first, *others = scores
    for name, task in first.scores.items():
        for other in others:
            if other.scores[name].ids != task.ids:
                raise VerificationError(f"task {name}: the models were not asked the same questions")
    return tuple(_task_row(name, [one.scores for one in scores]) for name in first.scores)


def _task_row(name: str, scores: Sequence[Mapping[str, TaskScores]]) -> TaskRow:
    of_task = [one[name] for one in scores]
    first = of_task[0]
    keys = [key for key in first.metrics if all(key in one.metrics for one in of_task)]
    return TaskRow(
        name,
        first.asked,
        first.shots,
        first.version,
        first.questions,
        first.available,
        _clusters(name, scores[0]),
        first.members,
        first.dataset,
        tuple(_metric_row(key, scores, name) for key in keys),
    )


def _clusters(name: str, scores: Mapping[str, TaskScores]) -> int | None:
    """Return the groups of related questions of a task, or of the tasks of a group together."""
    parts = [scores[member] for member in scores[name].members] or [scores[name]]
    if all(part.clusters is None for part in parts):
        return None
    return sum(part.questions if part.clusters is None else len(set(part.clusters)) for part in parts)


def _metric_row(key: str, scores: Sequence[Mapping[str, TaskScores]], name: str) -> MetricRow:
    found = [one[name].metrics[key] for one in scores]
    metric, _, of_filter = key.partition(",")
    return MetricRow(
        metric if of_filter in ("", "none") else f"{metric} ({of_filter})",
        found[0].higher_is_better,
        tuple(one.value for one in found),
        tuple(_stderr(one, of_model[name]) for one, of_model in zip(found, scores, strict=True)),
        tuple(_difference(key, scores[0], other, name) for other in scores[1:]),
    )


def _stderr(score: MetricScore, task: TaskScores) -> float | None:
    if task.clusters is None or score.by_question is None:
        return score.stderr
    return standard_error(score.by_question, task.clusters)


def _difference(
    key: str, ours: Mapping[str, TaskScores], theirs: Mapping[str, TaskScores], name: str
) -> Difference | None:
    task = ours[name]
    if not task.members:
        return _of_task(key, task, theirs[name])
    if key not in task.weighted and key.partition(",")[0] not in task.weighted:
        parts = [_of_task(key, ours[member], theirs[member]) for member in task.members]
        return None if None in parts else mean_difference([part for part in parts if part is not None])
    pairs = [(ours[member], theirs[member]) for member in task.members]
    values = [(one.metrics[key].by_question, other.metrics[key].by_question) for one, other in pairs
              if key in one.metrics and key in other.metrics]  # fmt: skip
    if len(values) < len(pairs) or any(None in pair for pair in values):
        return None
    clusters: list[Hashable] | None = None
    if any(one.clusters is not None for one, _ in pairs):
        clusters = [
            (one.task, cluster) for one, _ in pairs for cluster in (one.clusters or tuple(range(one.questions)))
        ]
    return paired_difference(
        [value for pair in values for value in pair[0] or ()],
        [value for pair in values for value in pair[1] or ()],
        clusters,
    )


def _of_task(key: str, ours: TaskScores, theirs: TaskScores) -> Difference | None:
    if key not in ours.metrics or key not in theirs.metrics:
        return None
    one, other = ours.metrics[key].by_question, theirs.metrics[key].by_question
    return None if one is None or other is None else paired_difference(one, other, ours.clusters)
