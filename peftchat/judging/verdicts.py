"""What judgments amount to: win rates with intervals, position bias, agreement of judges, and the part of length.

Both orders of a question are one observation. Intervals are 95 % percentiles of a bootstrap over questions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peftchat.judging.judge_run import Outcome
from peftchat.judging.style import STYLE, fit_style, style_differences, style_of
from peftchat.runs.eval_lines import wilson_interval

_DRAWS = 1000
_SEED = 20240229
_RIDGE = 0.01
"""Weight of the penalty on the slope of length: with few questions it could be anything."""

_ALIKE = 1e-6
"""Draws that differ by less are one number, but for rounding."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class JudgeVerdict:
    """What one judge said of two models.

    Attributes:
        judge: its name.
        questions: pairs that were judged.
        read: those whose two replies could be read; only they count.
        unread_replies: replies that could not be read.
        cut_replies: those of them that ended at the limit of tokens.
        wins_a: pairs that A wins in both orders.
        wins_b: pairs that B wins in both orders.
        ties: the others.
        win_rate: of A; a tie counts as half a win. None if nothing could be read.
        length_controlled: the same at equal length of the answers. None if nothing could be read.
        style_controlled: the same at equal length, headers, list items and bold parts. None if nothing could be read.
        style_slopes: covariate -> change of the log-odds of A by a typical difference of it; above zero, more wins.
        style_a: covariate -> its mean in an answer of A.
        style_b: covariate -> its mean in an answer of B.
        disagreements: pairs in which the orders have different winners.
        first_preferred: share of replies, ties left out, that prefer the answer shown first. None if all are ties.
        scores_a: score of A -> how often; empty for verdicts.
        scores_b: score of B -> how often.
        mean_length_a: mean characters of the answers of A.
        mean_length_b: mean characters of the answers of B.
        prompt_tokens: tokens of all requests.
        tokens: tokens of all replies.
    """

    judge: str
    questions: int
    read: int
    unread_replies: int
    cut_replies: int
    wins_a: int
    wins_b: int
    ties: int
    win_rate: Rate | None
    length_controlled: Rate | None
    style_controlled: Rate | None
    style_slopes: dict[str, Rate]
    style_a: dict[str, float]
    style_b: dict[str, float]
    disagreements: int
    first_preferred: float | None
    scores_a: dict[str, int]
    scores_b: dict[str, int]
    mean_length_a: float
    mean_length_b: float
    prompt_tokens: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def verdict_of(judge: str, outcomes: Sequence[Outcome]) -> JudgeVerdict:
    """Sum up the outcomes of one judge."""
    read = [outcome for outcome in outcomes if outcome.is_read]
    judgments = [judgment for outcome in outcomes for judgment in (outcome.forward, outcome.backward)]
    points = np.array([{"A": 1.0, "tie": 0.5, "B": 0.0}[str(outcome.winner)] for outcome in read])
    lengths = np.array([len(one.pair.answer_a) - len(one.pair.answer_b) for one in read], dtype=np.float64)
    winners = Counter(outcome.winner for outcome in read)
    chosen = [judgment.preference for judgment in judgments if judgment.preference in ("first", "second")]
    scores_a, scores_b = _scores(read)
    style_rate, slopes = _style(read, points)
    return JudgeVerdict(
        judge,
        len(outcomes),
        len(read),
        sum(judgment.preference is None for judgment in judgments),
        sum(judgment.winner is None and judgment.finish == "length" for judgment in judgments),
        winners["A"],
        winners["B"],
        winners["tie"],
        _rate(lambda at: float(points[at].mean()), len(read)),
        _rate(lambda at: length_controlled(points[at], lengths[at]), len(read)),
        style_rate,
        slopes,
        _mean_style([outcome.pair.answer_a for outcome in outcomes]),
        _mean_style([outcome.pair.answer_b for outcome in outcomes]),
        sum(not outcome.agrees for outcome in read),
        chosen.count("first") / len(chosen) if chosen else None,
        scores_a,
        scores_b,
        float(np.mean([len(one.pair.answer_a) for one in outcomes])),
        float(np.mean([len(one.pair.answer_b) for one in outcomes])),
        sum(judgment.prompt_tokens for judgment in judgments),
        sum(judgment.tokens for judgment in judgments),
    )


def _scores(outcomes: Sequence[Outcome]) -> tuple[dict[str, int], dict[str, int]]:
    both: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for outcome in outcomes:
        for judgment in (outcome.forward, outcome.backward):
            if judgment.scores is not None:
                shown = (judgment.scores.first, judgment.scores.second)
                for counter, score in zip(both, shown if judgment.order == "AB" else shown[::-1], strict=True):
                    counter[f"{score:g}"] += 1
    of_a, of_b = (dict(sorted(counter.items(), key=lambda item: float(item[0]))) for counter in both)
    return of_a, of_b


def _style(outcomes: Sequence[Outcome], points: Floats) -> tuple[Rate | None, dict[str, Rate]]:
    """Return the win rate at equal style and the slopes, with intervals of the same bootstrap as the others'."""
    count = len(outcomes)
    if not count:
        return None, {}
    random = np.random.default_rng(_SEED)
    weights = np.stack([np.bincount(random.integers(0, count, count), minlength=count) for _ in range(_DRAWS)])
    differences = style_differences([(one.pair.answer_a, one.pair.answer_b) for one in outcomes])
    whole = fit_style(points, differences, np.ones((1, count)))
    parts = [fit_style(points, differences, part) for part in np.array_split(weights.astype(np.float64), 10)]
    rates, slopes = np.concatenate([one.rates for one in parts]), np.concatenate([one.slopes for one in parts])
    # A covariate in which no pair differs says nothing.
    told = {name: at for at, name in enumerate(STYLE) if differences[:, at].any()}
    return _rate_with_interval(whole.rates[0], rates, count), {
        name: _with_interval(whole.slopes[0, at], slopes[:, at]) for name, at in told.items()
    }


def _with_interval(value: float, draws: Floats) -> Rate:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Rate(float(value), float(low), float(high))


def _rate_with_interval(value: float, draws: Floats, count: int) -> Rate:
    """Return a rate of questions. If all ended alike, all draws are alike, and Wilson's interval says more."""
    if np.ptp(draws) < _ALIKE:
        return Rate(float(value), *wilson_interval(float(value), count))
    return _with_interval(value, draws)


def _mean_style(answers: Sequence[str]) -> dict[str, float]:
    means = np.mean([style_of(answer) for answer in answers], axis=0)
    return dict(zip(STYLE, map(float, means), strict=True))


def _rate(statistic: Callable[[npt.NDArray[np.int64]], float], count: int) -> Rate | None:
    """Return a statistic of questions with its bootstrap interval; the draws are the same in each call."""
    if not count:
        return None
    random = np.random.default_rng(_SEED)
    draws = [statistic(random.integers(0, count, count)) for _ in range(_DRAWS)]
    return _rate_with_interval(statistic(np.arange(count)), np.array(draws), count)


def length_controlled(points: Floats, lengths: Floats) -> float:
    """Return the win rate at equal length, by a logistic regression on the difference of lengths.

    The minimal form of AlpacaEval 2's (Dubois et al. 2024, https://arxiv.org/abs/2404.04475): an intercept and
    `tanh` of the difference in its standard deviations. The intercept is the rate at equal length.

    Args:
        points: 1 for a win, 0.5 for a tie, 0 for a loss; shape (questions,).
        lengths: characters of A's answer minus those of B's; shape (questions,).
    """
    spread = float(lengths.std())
    feature = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    design = np.stack([np.ones_like(feature), feature], axis=1)
    # Half a win and half a loss more keep a model that wins always at a finite intercept.
    weights, penalty = np.zeros(2), np.array([1.0 / (len(points) + 1), _RIDGE])
    for _ in range(30):
        expected = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (expected - points) / len(points) + penalty * weights
        variance = expected * (1 - expected) / len(points)
        step = np.linalg.solve(design.T @ (design * variance[:, None]) + np.diag(penalty), gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def kappa(first: Sequence[Outcome], second: Sequence[Outcome]) -> float | None:
    """Return Cohen's kappa of two judges' winners (A, B or tie), over the pairs that both could judge.

    None where there are no such pairs, or where both say the same of all, so that chance explains it.
    """
    theirs = {outcome.pair.id: outcome.winner for outcome in second}
    pairs = [(one.winner, theirs.get(one.pair.id)) for one in first]
    pairs = [(one, other) for one, other in pairs if one is not None and other is not None]
    if not pairs:
        return None
    count = len(pairs)
    observed = sum(one == other for one, other in pairs) / count
    ours, others = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    by_chance = sum(ours[name] * others[name] for name in ours) / count**2
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


@dataclass(frozen=True)
class ExamResult:
    """How a judge did on pairs whose better answer is known.

    Attributes:
        judge: its name.
        pairs: how many.
        accuracy: share of pairs whose good answer wins in both orders, with Wilson's interval.
        disagreements: pairs in which the orders have different winners.
        first_preferred: share of replies, ties left out, that prefer the answer shown first.
        unread_replies: replies that could not be read.
    """

    judge: str
    pairs: int
    accuracy: Rate
    disagreements: int
    first_preferred: float | None
    unread_replies: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def exam_result(judge: str, outcomes: Sequence[Outcome]) -> ExamResult:
    """Return how a judge did; the good answer of each pair is A, and a reply that cannot be read is wrong."""
    share = sum(outcome.winner == "A" for outcome in outcomes) / len(outcomes)
    verdict = verdict_of(judge, outcomes)
    # Draws of pairs that are all right would be all right too: a bootstrap would be certain after one pair.
    accuracy = Rate(share, *wilson_interval(share, len(outcomes)))
    return ExamResult(
        judge, len(outcomes), accuracy, verdict.disagreements, verdict.first_preferred, verdict.unread_replies
    )
