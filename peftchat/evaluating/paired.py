"""Standard errors of a score, and paired intervals of the difference of two scores on the same questions.

Pure functions of per-question results. The formulas are those of Miller, "Adding Error Bars to Evals" (2024,
https://arxiv.org/abs/2411.00640), with the corrections for few questions that are named where they are used.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from peftchat.student import NORMAL95, t_quantile


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher the first of two models scores on the same questions.

    Attributes:
        mean: the mean difference of a question.
        stderr: its standard error; None for a single question or cluster.
        low, high: the ends of the 95 % interval; None likewise.
        questions: how many there are.
        clusters: how many groups of related questions there are; None where each question stands alone.
        higher, lower: on how many questions the first model scores higher, and lower.
        p_value: McNemar's exact test, two-sided; None for scores other than 0 and 1, and for related questions.
        method: how the interval was made.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    questions: int
    clusters: int | None
    higher: int
    lower: int
    p_value: float | None
    method: str

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Return the standard error of a mean; None for a single question or cluster.

    Args:
        values: the score of each question.
        clusters: the group of each question; questions of a group may depend on each other. None for independent ones.
    """
    count = len(values)
    if clusters is None:
        return stdev(values) / math.sqrt(count) if count > 1 else None
    # Equation 4 of Miller, as a sum over clusters: the cross terms of a cluster are the square of its sum. The factor
    # is the usual one for few clusters, as in inspect_ai (https://inspect.aisi.org.uk/scorers.html#clustered-stderr).
    mean = fmean(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    groups = len(sums)
    if groups < 2:
        return None
    return math.sqrt(math.fsum(total * total for total in sums.values()) * groups / (groups - 1)) / count


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Difference:
    """Return the difference of two models' scores on the same questions, with its 95 % interval.

    Scores of 0 and 1 on independent questions have the interval of Bonett and Price (2012,
    https://doi.org/10.3102/1076998611411915). It keeps its coverage where few questions tell the models apart, and is
    not empty where none does. Everything else has Student's interval, over questions or over clusters.

    Args:
        ours: the score of each question.
        theirs: those of the other model, in the same order; at least one.
        clusters: the group of each question; None for independent ones.
    """
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    count = len(differences)
    higher = sum(difference > 0 for difference in differences)
    lower = sum(difference < 0 for difference in differences)
    mean = fmean(differences)
    groups = None if clusters is None else len(set(clusters))
    independent = groups is None or groups == count
    error = standard_error(differences, None if independent else clusters)
    binary = all(value in (0, 1) for value in (*ours, *theirs))
    shared = None if independent else groups
    if independent and binary:
        low, high = _bonett_price(higher, lower, count)
        p_value = mcnemar(higher, lower)
        return Difference(mean, error, low, high, count, shared, higher, lower, p_value, "Bonett-Price")
    if error is None:
        return Difference(mean, None, None, None, count, shared, higher, lower, None, "none")
    margin = t_quantile((count if independent else groups or count) - 1) * error
    method = "Student" if independent else "Student over clusters"
    return Difference(mean, error, mean - margin, mean + margin, count, shared, higher, lower, None, method)


def mean_difference(parts: Sequence[Difference]) -> Difference:
    """Return the mean of the differences on several tasks, each of the same weight, with its 95 % interval.

    The tasks are those that were asked for, not a sample of tasks: only their questions vary.

    Args:
        parts: one difference per task; at least one.
    """
    count = len(parts)
    mean = fmean(part.mean for part in parts)
    questions = sum(part.questions for part in parts)
    higher, lower = sum(part.higher for part in parts), sum(part.lower for part in parts)
    errors = [part.stderr for part in parts if part.stderr is not None]
    if len(errors) < count:
        return Difference(mean, None, None, None, questions, None, higher, lower, None, "none")
    error = math.sqrt(math.fsum(value * value for value in errors)) / count
    margin = NORMAL95 * error
    return Difference(mean, error, mean - margin, mean + margin, questions, None, higher, lower, None, "mean of tasks")


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], sizes: Sequence[int]) -> Difference:
    """Return the difference of two means over parts, such as the loss per token, with its 95 % interval.

    The parts of an item depend on each other, so the items are what varies: Student's interval of the ratio of sums,
    linearized (Cochran, Sampling Techniques, 6.4).

    Args:
        ours: the sum over the parts of each item, such as the loss of a conversation.
        theirs: that of the other model.
        sizes: the parts of each item, such as its tokens; more than none in all.
    """
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    count, total = len(sizes), sum(sizes)
    mean = math.fsum(differences) / total
    higher = sum(difference > 0 for difference in differences)
    lower = sum(difference < 0 for difference in differences)
    if count < 2:
        return Difference(mean, None, None, None, count, None, higher, lower, None, "none")
    residuals = [difference - mean * size for difference, size in zip(differences, sizes, strict=True)]
    error = math.sqrt(math.fsum(value * value for value in residuals) * count / (count - 1)) / total
    margin = t_quantile(count - 1) * error
    return Difference(mean, error, mean - margin, mean + margin, count, None, higher, lower, None, "Student of a ratio")


def mcnemar(higher: int, lower: int) -> float:
    """Return the p-value of McNemar's exact test: two-sided, from the questions on which two models differ.

    Args:
        higher, lower: on how many the first model scores higher, and lower.
    """
    differing = higher + lower
    tail = sum(math.comb(differing, successes) for successes in range(min(higher, lower) + 1))
    return min(1.0, 2 * tail / 2**differing)


def _bonett_price(higher: int, lower: int, count: int) -> tuple[float, float]:
    """Return the interval of a difference of two paired proportions."""
    more, less = (higher + 1) / (count + 2), (lower + 1) / (count + 2)
    margin = NORMAL95 * math.sqrt((more + less - (more - less) ** 2) / (count + 2))
    return max(-1.0, more - less - margin), min(1.0, more - less + margin)
