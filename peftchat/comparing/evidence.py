"""Evidence of a comparison: the held-out losses of all candidates, paired by conversation and by seed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peftchat.comparing.outcomes import CandidateResult
from peftchat.comparing.paired_statistics import (
    NEGLIGIBLE,
    Gap,
    PairedComparison,
    PairedLosses,
    compare_paired,
    number_clusters,
    practical_threshold,
)

Clusters = Mapping[str, str]
"""The cluster of a held-out conversation by its source, `file:line`."""

_MOST_ALIKE = 32
"""Conversations that may start alike and still be branches of one tree, whatever their share."""

_SHARE_ALIKE = 1 / 8
"""A larger part of all conversations that starts alike starts with a greeting."""


def read_clusters(file: Path) -> dict[str, str]:
    """Return the cluster of every conversation of a file: its first user message, which the branches of a tree share.

    A first message that a great many conversations share is a greeting; each of these is a cluster of its own.
    """
    from peftchat.conversations import read_conversations

    starts = {
        one.source: next((message.content for message in one.messages if message.role == "user"), one.source)
        for one in read_conversations(str(file), format="messages")
    }
    most = max(_MOST_ALIKE, _SHARE_ALIKE * len(starts))
    counts = Counter(starts.values())
    return {source: source if counts[start] > most else start for source, start in starts.items()}


@dataclass(frozen=True)
class Evidence:
    """What the finished candidates' held-out losses say about each other.

    Attributes:
        candidates: those with a run of every seed, or of the most seeds that any candidate has.
        paired: the comparison of every pair, in the same order.
        threshold: the difference in nats per token up to which losses count as equal.
        by_conversation: whether the losses of single conversations are known.
    """

    candidates: Sequence[CandidateResult]
    paired: PairedComparison
    threshold: float
    by_conversation: bool

    @classmethod
    def of(
        cls, candidates: Sequence[CandidateResult], clusters: Clusters | None = None, negligible: float = NEGLIGIBLE
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
        losses = _paired_by_conversation(complete, seeds, clusters or {})
        by_conversation = losses is not None
        if losses is None:
            means = np.array([[one.losses[seed] for seed in seeds] for one in complete])
            losses = PairedLosses(means[..., None], np.ones(1), np.zeros(1, np.int64))
        paired = compare_paired(losses)
        threshold = practical_threshold(float(paired.losses.min()), len(seeds), negligible)
        return cls(complete, paired, threshold, by_conversation)

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


def _paired_by_conversation(
    candidates: Sequence[CandidateResult], seeds: Sequence[int], clusters: Clusters
) -> PairedLosses | None:
    """Return the losses by conversation; None if a run has none, or they are of other conversations."""
    runs = [[next(run for run in one.runs if run.job.seed == seed) for seed in seeds] for one in candidates]
    held_out = [run.held_out for of_candidate in runs for run in of_candidate]
    first = held_out[0]
    if not first or any([(one.source, one.tokens) for one in run] != [(one.source, one.tokens) for one in first]
                        for run in held_out):  # fmt: skip
        return None
    sums = np.array([[[one.loss for one in run.held_out] for run in of_candidate] for of_candidate in runs])
    if not np.isfinite(sums).all():
        return None
    keys = [clusters.get(one.source, one.source) for one in first]
    return PairedLosses(sums, np.array([float(one.tokens) for one in first]), number_clusters(keys))


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
