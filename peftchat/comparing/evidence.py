"""Evidence of a comparison: what was measured of all candidates, paired by held-out case and by seed.

A case is a conversation with its loss, or a preference pair or labeled answer that is right or wrong.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peftchat.comparing.measure import LOSS, Measure
from peftchat.comparing.outcomes import CandidateResult, RunResult
from peftchat.comparing.pair_scores import wrong
from peftchat.comparing.paired_statistics import (
    NEGLIGIBLE,
    Gap,
    PairedComparison,
    PairedLosses,
    compare_paired,
    compare_shares,
    number_clusters,
)
from peftchat.conversation import Conversation

Clusters = Mapping[str, str]
"""The cluster of a held-out conversation or pair by its source, `file:line`."""

_MOST_ALIKE = 32
"""Conversations that may start alike and still be branches of one tree, whatever their share."""

_SHARE_ALIKE = 1 / 8
"""A larger part of all conversations that starts alike starts with a greeting."""


def read_clusters(held_out: Iterable[Conversation]) -> dict[str, str]:
    """Return the cluster of every conversation: its first user message, which the branches of a tree share.

    A first message that a great many conversations share is a greeting; each of these is a cluster of its own.
    """
    starts = {
        one.source: next((message.content for message in one.messages if message.role == "user"), one.source)
        for one in held_out
    }
    most = max(_MOST_ALIKE, _SHARE_ALIKE * len(starts))
    counts = Counter(starts.values())
    return {source: source if counts[start] > most else start for source, start in starts.items()}


@dataclass(frozen=True)
class Evidence:
    """What the finished candidates' held-out cases say about each other.

    What is called a loss here is what the measure counts: the loss, or the share of cases that are wrong.

    Attributes:
        candidates: those with a run of every seed, or of the most seeds that any candidate has.
        paired: the comparison of every pair, in the same order.
        threshold: the difference up to which losses count as equal.
        by_conversation: whether the losses of single cases are known.
        measure: what candidates are compared by.
    """

    candidates: Sequence[CandidateResult]
    paired: PairedComparison
    threshold: float
    by_conversation: bool
    measure: Measure = LOSS

    @classmethod
    def of(
        cls,
        candidates: Sequence[CandidateResult],
        clusters: Clusters | None = None,
        negligible: float = NEGLIGIBLE,
        measure: Measure = LOSS,
    ) -> "Evidence | None":
        """Pair the losses of the finished candidates; None if no run has finished."""
        finished = [one for one in candidates if one.runs]
        if not finished:
            return None
        most = max(len(one.runs) for one in finished)
        complete = [one for one in finished if len(one.runs) == most]
        seeds = sorted(set.intersection(*({run.job.seed for run in one.runs} for one in complete)))
        if not seeds:  # Each has lost another seed.
            complete, seeds = complete[:1], [run.job.seed for run in complete[0].runs]
        losses = _paired_by_case(complete, seeds, clusters or {}, measure)
        by_conversation = losses is not None
        if losses is None:
            means = np.array([[wrong(run, measure) for run in _of_seeds(one, seeds)] for one in complete])
            losses = PairedLosses(means[..., None], np.ones(1), np.zeros(1, np.int64))
        paired = compare_shares(losses) if measure.is_share and by_conversation else compare_paired(losses)
        threshold = measure.threshold(float(paired.losses.min()), len(seeds), negligible)
        return cls(complete, paired, threshold, by_conversation, measure)

    @property
    def lowest(self) -> CandidateResult:
        """The candidate with the lowest mean loss."""
        return self.candidates[int(self.paired.losses.argmin())]

    @property
    def tied(self) -> list[CandidateResult]:
        """The candidates that are not certainly worse than any other."""
        return [self.candidates[place] for place in self.paired.tied(self.threshold)]

    def gap(self, lower: CandidateResult, higher: CandidateResult) -> Gap | None:
        """Return how much the loss of `higher` is above that of `lower`; None if one of them is not complete."""
        places = [self._place(one) for one in (lower, higher)]
        if places[0] is None or places[1] is None:
            return None
        return self.paired.gap(places[0], places[1])

    def is_worse(self, lower: CandidateResult, higher: CandidateResult) -> bool:
        """Return whether `higher` is certainly worse than `lower`."""
        places = [self._place(one) for one in (lower, higher)]
        if places[0] is None or places[1] is None:
            return False
        return self.paired.is_worse(places[0], places[1], self.threshold)

    def loss(self, candidate: CandidateResult) -> float:
        """Return a candidate's mean loss over the seeds that all have."""
        place = self._place(candidate)
        assert place is not None
        return float(self.paired.losses[place])

    def _place(self, candidate: CandidateResult) -> int | None:
        return next((place for place, one in enumerate(self.candidates) if one is candidate), None)


def _of_seeds(candidate: CandidateResult, seeds: Sequence[int]) -> list[RunResult]:
    return [next(run for run in candidate.runs if run.job.seed == seed) for seed in seeds]


def _cases(run: RunResult, measure: Measure) -> list[tuple[str, float, float]]:
    """Return the source of every held-out case, its weight, and its weighted loss."""
    if measure.is_share:
        return [(one.source, 1.0, 1 - one.right) for one in run.scores]
    return [(one.source, float(one.tokens), one.loss) for one in run.held_out]


def _paired_by_case(
    candidates: Sequence[CandidateResult], seeds: Sequence[int], clusters: Clusters, measure: Measure
) -> PairedLosses | None:
    """Return the losses by case; None if a run has none, or they are of other cases."""
    runs = [[_cases(run, measure) for run in _of_seeds(one, seeds)] for one in candidates]
    names = [[one[:2] for one in run] for of_candidate in runs for run in of_candidate]
    first = names[0]
    if not first or any(run != first for run in names):
        return None
    sums = np.array([[[one[2] for one in run] for run in of_candidate] for of_candidate in runs])
    if not np.isfinite(sums).all():
        return None
    keys = [clusters.get(source, source) for source, _ in first]
    return PairedLosses(sums, np.array([weight for _, weight in first]), number_clusters(keys))


def forgetting_gap(less: CandidateResult, more: CandidateResult) -> Gap | None:
    """Return how much higher the loss of `more` on general text is, with an interval over parts of the text.

    It is that of one seed. None if one of them has no such loss.
    """
    first, second = less.evaluation, more.evaluation
    if first.general_loss is None or second.general_loss is None:
        return None
    if len(first.general_parts) < 2 or [one[1] for one in first.general_parts] != [
        one[1] for one in second.general_parts
    ]:
        return Gap(second.general_loss - first.general_loss, None, None)
    sums = np.array([[[part[0] for part in one.general_parts]] for one in (first, second)])
    tokens = np.array([float(part[1]) for part in first.general_parts])
    return compare_paired(PairedLosses(sums, tokens, np.arange(len(tokens)))).gap(0, 1)
