"""Paired statistics of held-out losses: differences between candidates, with intervals by conversation and by seed.

All candidates are evaluated on the same conversations, and their runs of one seed see the same data in the same order.
So differences are formed conversation by conversation and seed by seed, before anything is averaged (E. Miller, 2024,
"Adding error bars to evals", https://arxiv.org/abs/2411.00640). Their variance has two parts, which are added and whose
common part is subtracted once, but never below the larger of the two (Cameron, Gelbach and Miller, 2011, "Robust
inference with multiway clustering"; the bound is that of MacKinnon, Nielsen and Webb, 2024,
https://arxiv.org/abs/2406.08880):

- *Conversations*, in clusters that are not independent of each other, such as the branches of one tree. The variance is
  the jackknife over clusters (CV3 in MacKinnon, Nielsen and Webb, 2023, https://arxiv.org/abs/2205.03285). Its degrees
  of freedom are those of Kish's effective number of clusters, as a few long conversations may hold most tokens.
- *Seeds*. Two or three seeds leave a variance of one or two degrees of freedom. It is therefore drawn towards the one
  that all pairs share, with the weight of `PRIOR_SEEDS` further seeds (Smyth, 2004, "Linear models and empirical Bayes
  methods", for samples as small as these).

The ratio of a difference to its standard error has parts of different degrees of freedom. Its quantiles are taken from
draws. Of the two usual approximations, one is too wide with few seeds and one too narrow: the interval of a pair alone
takes the middle. Statements on all pairs at once hold for whatever pair is picked afterwards. They take the quantile of
the largest ratio of all pairs, by the wide one ("max-t": Hothorn, Bretz and Westfall, 2008, "Simultaneous inference in
general parametric models"). `scripts/calibrate_compare.py` measures how often all of this holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
"""Of every interval."""

PRIOR_SEEDS = 4.0
"""Seeds that the variance over all pairs counts as, beside those of the pair itself."""

NEGLIGIBLE = 0.005
"""Fraction of the lowest loss below which a difference counts as a tie, however certain it is."""

ONE_SEED_NOISE = 0.015
"""Fraction of the lowest loss that stands for the noise of runs with a single seed."""

_NORMAL = 1.96
"""Quantile of a normal variable for an interval of 95 %."""

_DRAWS = 4000
_MAX_FREEDOM = 200
_DRAWS_SEED = 20240607
"""Fixed, so that the same losses always give the same interval."""

_MEDIAN_OF_CHI_SQUARE = (0.4549, 0.6931, 0.7887, 0.8392, 0.8703, 0.8914, 0.9065)
"""Median of chi-square divided by its degrees of freedom, for 1 to 7 of them; about `1 - 2/(3 d)` beyond."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How much higher one loss is than another.

    Attributes:
        mean: the difference in nats per token.
        margin: half its 95 % interval; None with fewer than two clusters of conversations.
        margin_together: half the interval that holds for all pairs of the comparison at once.
    """

    mean: float
    margin: float | None
    margin_together: float | None


@dataclass(frozen=True)
class PairedLosses:
    """The held-out losses of every candidate, seed and conversation.

    Attributes:
        sums: negative log-likelihood in nats of each conversation's targets, shape (candidates, seeds, conversations).
        tokens: the targets of each conversation, shape (conversations,).
        clusters: the cluster of each conversation, numbered from 0 without gaps, shape (conversations,).
    """

    sums: Floats
    tokens: Floats
    clusters: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.sums.ndim == 3 and self.sums.shape[2] == len(self.tokens) == len(self.clusters)
        assert np.isfinite(self.sums).all() and (self.tokens > 0).all()

    @property
    def num_seeds(self) -> int:
        """The number of seeds."""
        return self.sums.shape[1]

    @cached_property
    def num_clusters(self) -> int:
        """The number of clusters."""
        return int(self.clusters.max()) + 1

    def by_cluster(self) -> tuple[Floats, Floats]:
        """Return the losses and the tokens by cluster, shapes (candidates, seeds, clusters) and (clusters,)."""
        order = np.argsort(self.clusters, kind="stable")
        starts = np.searchsorted(self.clusters[order], np.arange(self.num_clusters))
        return np.add.reduceat(self.sums[..., order], starts, axis=2), np.add.reduceat(self.tokens[order], starts)


def number_clusters(keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return a number for each key, the same for the same key, in the order of their first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class PairedComparison:
    """What paired losses say about every pair of candidates.

    Attributes:
        losses: mean held-out loss over tokens and seeds, shape (candidates,).
        errors: standard error of the difference of each pair, shape (candidates, candidates); NaN where unknown.
        quantiles: its multiple for the interval of that pair alone, same shape.
        quantile_together: the multiple for all pairs at once.
        num_conversations, num_clusters, num_seeds: what they were measured on.
        effective_clusters: clusters of equal length that would say as much (Kish).
    """

    losses: Floats
    errors: Floats
    quantiles: Floats
    quantile_together: float
    num_conversations: int
    num_clusters: int
    num_seeds: int
    effective_clusters: float

    def gap(self, lower: int, higher: int) -> Gap:
        """Return how much the loss of the candidate `higher` is above that of `lower`."""
        mean = float(self.losses[higher] - self.losses[lower])
        if lower == higher:
            return Gap(0.0, 0.0, 0.0)
        error = float(self.errors[lower, higher])
        if not np.isfinite(error):
            return Gap(mean, None, None)
        return Gap(mean, error * float(self.quantiles[lower, higher]), error * self.quantile_together)

    def is_different(self, one: int, other: int, threshold: float) -> bool:
        """Return whether two losses certainly differ, and by more than a threshold in nats per token.

        One seed says nothing about the noise of runs. The threshold then stands for it, and is added to the interval.
        """
        gap = self.gap(one, other)
        if gap.margin_together is None:
            return False
        if self.num_seeds == 1:
            return abs(gap.mean) > gap.margin_together + threshold
        return abs(gap.mean) > max(gap.margin_together, threshold)

    def is_worse(self, lower: int, higher: int, threshold: float) -> bool:
        """Return whether a loss is certainly higher than another, and by more than a threshold in nats per token."""
        return self.losses[higher] > self.losses[lower] and self.is_different(lower, higher, threshold)

    def tied(self, threshold: float) -> list[int]:
        """Return the candidates that are not certainly worse than any other by more than a threshold."""
        places = range(len(self.losses))
        return [one for one in places if not any(self.is_worse(other, one, threshold) for other in places)]


def practical_threshold(lowest: float, num_seeds: int, negligible: float = NEGLIGIBLE) -> float:
    """Return the difference in nats per token up to which losses count as equal, given the lowest one."""
    return abs(lowest) * (negligible if num_seeds > 1 else max(negligible, ONE_SEED_NOISE))


def least_errors(scores: Floats, clusters: npt.NDArray[np.int64]) -> Floats:
    """Return the least standard error of the difference of each pair's mean score, shape (candidates, candidates).

    It is that of Bonett and Price (2012, https://doi.org/10.3102/1076998611411915), which counts one more case on
    either side. Where few cases differ, the usual one is too small. Their cases are right or wrong; one that some seeds
    have right counts by the square of its difference. It is zero for scores beyond 0 to 1.

    Args:
        scores: of each candidate and case, the mean over seeds, shape (candidates, cases).
        clusters: the cluster of each case; related ones count as one, in parts of a cluster of mean size.
    """
    return np.array([[_least_error(row, other, clusters) for other in scores] for row in scores])


def _least_error(ours: Floats, theirs: Floats, clusters: npt.NDArray[np.int64]) -> float:
    if min(ours.min(), theirs.min()) < 0 or max(ours.max(), theirs.max()) > 1:
        return 0.0
    sums = np.bincount(clusters, weights=ours - theirs)
    moves = sums * len(sums) / len(clusters)
    count = len(moves) + 2
    return math.sqrt((float((moves**2).sum()) + 2) / count - (float(moves.sum()) / count) ** 2) / math.sqrt(count)


def compare_paired(losses: PairedLosses, confidence: float = CONFIDENCE) -> PairedComparison:
    """Compare all pairs of candidates.

    Runs on the same conversations in another order, or on other numbers of the clusters, give the same result up to
    rounding.

    Args:
        losses: of every candidate, seed and conversation.
        confidence: of every interval.
    """
    sums, tokens = losses.by_cluster()
    candidates, seeds, clusters = sums.shape
    total = tokens.sum()
    weights = tokens / total
    means = sums.sum(axis=2) / total
    mean = means.mean(axis=1)
    errors = np.full((candidates, candidates), np.nan)
    quantiles = np.full((candidates, candidates), np.nan)
    together = float("nan")
    effective = float(1 / (weights**2).sum())
    if clusters > 1 and candidates > 1:
        # Leaving a cluster out moves the mean by this, shape (candidates, seeds, clusters).
        moves = (sums - means[..., None] * tokens) / total / (1 - weights)
        first, second = np.triu_indices(candidates, 1)
        parts = _Parts.of(moves, means, first, second)
        error = np.sqrt(parts.variance)
        draws = _draw_ratios(parts, moves.mean(axis=1), error, first, second, freedom=max(1.0, effective - 1))
        alone = (np.quantile(draws.wide, confidence, axis=0) + np.quantile(draws.narrow, confidence, axis=0)) / 2
        together = float(np.quantile(draws.wide.max(axis=1), confidence))
        for table, values in ((errors, error), (quantiles, alone)):
            table[first, second] = table[second, first] = values
    return PairedComparison(mean, errors, quantiles, together, len(losses.tokens), clusters, seeds, effective)


def compare_shares(losses: PairedLosses) -> PairedComparison:
    """Compare all pairs of candidates by shares of cases that are wrong: no error is below `least_errors`."""
    paired = compare_paired(losses)
    floors = least_errors(losses.sums.mean(axis=1), losses.clusters)
    # Where no case differs, no draw does either: the ratios are then those of a normal variable at least.
    return replace(
        paired,
        errors=np.maximum(paired.errors, floors),
        quantiles=np.maximum(paired.quantiles, _NORMAL),
        quantile_together=max(paired.quantile_together, _NORMAL),
    )


@dataclass(frozen=True)
class _Parts:
    """The variance of each pair's difference and its parts, each of shape (pairs,).

    Attributes:
        of_clusters: of conversations.
        of_seeds: what seeds add to it.
        seed_freedom: degrees of freedom of the variance over seeds.
    """

    of_clusters: Floats
    of_seeds: Floats
    seed_freedom: float

    @property
    def variance(self) -> Floats:
        """The variance of the difference."""
        return self.of_clusters + self.of_seeds

    @classmethod
    def of(cls, moves: Floats, means: Floats, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> "_Parts":
        """Estimate the parts from jackknife moves and means by seed."""
        seeds, clusters = moves.shape[1:]
        shrink = (clusters - 1) / clusters
        average = moves.mean(axis=1)
        of_clusters = shrink * ((average[first] - average[second]) ** 2).sum(axis=1)
        if seeds == 1:
            return cls(of_clusters, np.zeros_like(of_clusters), 1.0)
        own = (means[first] - means[second]).var(axis=1, ddof=1)
        freedom = seeds - 1.0
        if len(own) > 1:
            shared = float(np.median(own)) / _chi_square_median(seeds - 1)
            own = (PRIOR_SEEDS * shared + freedom * own) / (PRIOR_SEEDS + freedom)
            freedom += PRIOR_SEEDS
        of_seeds = own / seeds
        rest = moves - average[:, None]
        # The noise of single conversations in single runs is in both variances.
        both = shrink * ((rest[first] - rest[second]) ** 2).sum(axis=(1, 2)) / (seeds - 1) / seeds
        variance = np.maximum(np.maximum(of_clusters, of_seeds), of_clusters + of_seeds - both)
        return cls(of_clusters, variance - of_clusters, freedom)


def _chi_square_median(freedom: int) -> float:
    """Return the median of chi-square divided by its degrees of freedom."""
    if freedom <= len(_MEDIAN_OF_CHI_SQUARE):
        return _MEDIAN_OF_CHI_SQUARE[freedom - 1]
    return 1 - 2 / (3 * freedom)


@dataclass(frozen=True)
class _Ratios:
    """Draws of the absolute ratios of all differences to their standard errors, shape (draws, pairs).

    Attributes:
        wide: the sum of two Student variables (Behrens-Fisher); with few seeds its intervals hold too often.
        narrow: the ratio with a drawn standard error (the parametric bootstrap of Krishnamoorthy, Lu and Mathew,
            2007, "A parametric bootstrap approach for ANOVA with unequal variances"); these hold too seldom.
    """

    wide: Floats
    narrow: Floats


def _draw_ratios(
    parts: _Parts,
    moves: Floats,
    error: Floats,
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    freedom: float,
) -> _Ratios:
    """Draw the ratios of all differences to their standard errors, if no candidate differs from another.

    Args:
        parts: variances.
        moves: of each candidate by cluster, shape (candidates, clusters); candidates that err on the same
            conversations do so in the draws.
        error: standard errors, shape (pairs,).
        first, second: the candidates of each pair.
        freedom: degrees of freedom of the variance of conversations.
    """
    generator = np.random.default_rng(_DRAWS_SEED)
    candidates, clusters = moves.shape
    values, vectors = np.linalg.eigh((clusters - 1) / clusters * moves @ moves.T)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))).T
    mean = generator.standard_normal((_DRAWS, candidates)) @ root
    # The variance of each pair is an estimate as well; estimates of pairs that share a candidate are alike.
    count = int(min(max(1.0, np.floor(freedom)), _MAX_FREEDOM))
    samples = generator.standard_normal((_DRAWS, count, candidates)) @ root
    wishart = np.matmul(samples.transpose(0, 2, 1), samples) / count
    of_clusters = wishart[:, first, first] + wishart[:, second, second] - 2 * wishart[:, first, second]
    noise = generator.standard_normal((_DRAWS, candidates))
    # Differences of independent noise correlate by 1/2 where they share a candidate.
    of_seeds = (noise[:, first] - noise[:, second]) / np.sqrt(2.0)
    of_seeds *= np.sqrt(parts.of_seeds)
    chi = generator.chisquare(parts.seed_freedom, (_DRAWS, len(first))) / parts.seed_freedom
    difference = mean[:, first] - mean[:, second]
    with np.errstate(invalid="ignore", divide="ignore"):
        narrow = (difference + of_seeds) / np.sqrt(of_clusters + parts.of_seeds * chi)
        wide = (difference * np.sqrt(parts.of_clusters / of_clusters) + of_seeds / np.sqrt(chi)) / error
    # Two candidates with the same losses have no error, and no difference either.
    return _Ratios(*(np.where(np.isfinite(ratios), np.abs(ratios), 0.0) for ratios in (wide, narrow)))
