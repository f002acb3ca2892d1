"""What the scores on tasks say about candidates: paired by question and by seed, for all pairs and tasks at once.

The intervals are those of held-out losses (`paired_statistics`) with a question in the place of a conversation. Two
things are added, both of which widen them. With several tasks, each interval holds with a part of the error rate
(Bonferroni). And an error is never below that of Bonett and Price (2012, https://doi.org/10.3102/1076998611411915),
which counts one more question on either side: where few questions differ, the usual one is too small.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftchat.comparing.outcomes import CandidateResult
from peftchat.comparing.paired_statistics import (
    CONFIDENCE,
    PairedComparison,
    PairedLosses,
    compare_paired,
    least_errors,
    number_clusters,
)
from peftchat.comparing.task_scores import TaskScore

Floats = npt.NDArray[np.float64]

NEGLIGIBLE_SCORE = 0.01
"""Difference of a score up to which it counts as equal, however certain: a point of a hundred."""

ONE_SEED_SCORE = 0.02
"""Added to the interval where a single seed does not show the noise of runs. It is a guess."""


@dataclass(frozen=True, slots=True)
class TaskGap:
    """How much worse one candidate is than another on a task, in units of its metric.

    Attributes:
        mean: the difference; above zero, it is worse.
        margin: half the interval that holds for all pairs and tasks at once; None with fewer than two questions.
    """

    mean: float
    margin: float | None


@dataclass(frozen=True)
class TaskComparison:
    """All candidates on one task.

    Attributes:
        task: its name.
        metric: the metric that counts.
        higher_is_better: its direction.
        questions: how many were asked.
        clusters: groups of related questions; as many as questions where each stands alone.
        seeds: runs of each candidate that were asked.
        names: the candidates that were asked with all their seeds.
        means: score of each.
        errors: standard error of each score, over questions.
    """

    task: str
    metric: str
    higher_is_better: bool
    questions: int
    clusters: int
    seeds: int
    names: Sequence[str]
    means: Sequence[float]
    errors: Sequence[float | None]
    _paired: PairedComparison
    _floors: Floats

    @property
    def title(self) -> str:
        """Task and metric."""
        return f"{self.task} {self.metric}"

    def score(self, name: str) -> tuple[float, float | None] | None:
        """Return the score of a candidate and its standard error; None if it was not asked."""
        if name not in self.names:
            return None
        place = self.names.index(name)
        return self.means[place], self.errors[place]

    @property
    def best(self) -> str:
        """The candidate with the best score."""
        return self.names[int(np.argmax(self.means) if self.higher_is_better else np.argmin(self.means))]

    def gap(self, better: str, worse: str) -> TaskGap | None:
        """Return how much worse `worse` is than `better`; None if one of them was not asked."""
        if better not in self.names or worse not in self.names:
            return None
        one, other = self.names.index(better), self.names.index(worse)
        mean = (self.means[one] - self.means[other]) * (1 if self.higher_is_better else -1)
        error = float(self._paired.errors[one, other])
        if one == other or not math.isfinite(error):
            return TaskGap(mean, None)
        return TaskGap(mean, self._paired.quantile_together * max(error, float(self._floors[one, other])))

    def is_worse(self, better: str, worse: str) -> bool:
        """Return whether `worse` is certainly worse than `better`, by more than counts as equal."""
        gap = self.gap(better, worse)
        if gap is None or gap.margin is None:
            return False
        if self.seeds == 1:
            return gap.mean > gap.margin + ONE_SEED_SCORE
        return gap.mean > max(gap.margin, NEGLIGIBLE_SCORE)


@dataclass(frozen=True)
class TaskEvidence:
    """All candidates on all tasks.

    Attributes:
        tasks: candidates with each other.
        against_base: candidate -> it and the base, one for each task.
        failures: candidate -> why it could not be asked.
    """

    tasks: Sequence[TaskComparison]
    against_base: Mapping[str, Sequence[TaskComparison]]
    failures: Mapping[str, str]

    @classmethod
    def of(cls, candidates: Sequence[CandidateResult], base: Sequence[TaskScore] = ()) -> "TaskEvidence":
        """Pair the scores of all candidates that were asked, and of each with those of the base."""
        failures = {one.candidate.name: one.task_error for one in candidates if one.task_error is not None}
        asked = {one.candidate.name: one.task_scores for one in candidates if one.task_scores and not one.task_error}
        most = max((len(of_seeds) for of_seeds in asked.values()), default=0)
        complete = {name: of_seeds for name, of_seeds in asked.items() if len(of_seeds) == most}
        against = {}
        for name, of_seeds in asked.items() if base else ():
            against[name] = _compare({"base": [base] * len(of_seeds), name: of_seeds})
        return cls(_compare(complete), against, failures)

    def worse_task(self, better: str, worse: str) -> TaskComparison | None:
        """Return a task on which `worse` is certainly worse than `better`."""
        return next((task for task in self.tasks if task.is_worse(better, worse)), None)

    def set_aside(self, names: Sequence[str]) -> dict[str, tuple[TaskComparison, str]]:
        """Return who of these is certainly worse than another one of them on a task, with the task and the other."""
        found = {}
        for worse in names:
            for better in names:
                task = self.worse_task(better, worse)
                if task is not None:
                    found[worse] = task, better
                    break
        return found


def _compare(scores: Mapping[str, Sequence[Sequence[TaskScore]]]) -> list[TaskComparison]:
    """Return a comparison for each task.

    Args:
        scores: candidate -> for each seed, the scores on all tasks.
    """
    if not scores:
        return []
    first = next(iter(scores.values()))[0]
    # All intervals of all tasks hold at once.
    confidence = 1 - (1 - CONFIDENCE) / len(first)
    return [_compare_task(place, scores, confidence) for place in range(len(first))]


def _compare_task(place: int, scores: Mapping[str, Sequence[Sequence[TaskScore]]], confidence: float) -> TaskComparison:
    one = next(iter(scores.values()))[0][place]
    values = np.array([[of_seed[place].values for of_seed in of_seeds] for of_seeds in scores.values()])
    weights = np.array(one.weights)
    clusters = number_clusters(one.clusters or [str(number) for number in range(len(weights))])
    paired = compare_paired(PairedLosses(values * weights, weights, clusters), confidence)
    means = paired.losses
    by_question = values.mean(axis=1)
    errors = [_standard_error(row, weights, clusters) for row in by_question]
    names = list(scores)
    floors = least_errors(by_question, clusters)
    return TaskComparison(
        one.task, one.metric, one.higher_is_better, len(weights), int(clusters.max()) + 1, values.shape[1], names,
        [float(mean) for mean in means], errors, paired, floors,
    )  # fmt: skip


def _standard_error(values: Floats, weights: Floats, clusters: npt.NDArray[np.int64]) -> float | None:
    """Return the standard error of a weighted mean over questions."""
    from peftchat.evaluating.paired import standard_error

    mean = float((values * weights).sum() / weights.sum())
    moves = (values - mean) * weights / weights.mean()
    return standard_error(moves.tolist(), clusters.tolist())
