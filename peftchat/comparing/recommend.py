"""Recommendation of a candidate, with its reasons and warnings."""

from collections.abc import Sequence
from dataclasses import dataclass

from peftchat.comparing.candidates import describe
from peftchat.comparing.outcomes import CandidateResult, Estimate, estimate
from peftchat.formatting import format_count, format_percent

NEGLIGIBLE = 0.005
"""Fraction of the lower loss below which a difference counts as a tie, however certain it is."""

_SINGLE_SEED_NEGLIGIBLE = 0.01
"""The same for a single seed, which has no interval."""

_EQUAL_COST = 0.95
"""Costs whose ratio is above this count as equal, since timings vary by as much."""

_MAX_FORGETTING = 0.05
"""Relative rise of the general loss above which a warning is given."""

_MAX_TOKEN_RATIO = 1.1
"""Ratio of the most to the fewest tokens of a run above which a warning is given."""


@dataclass(frozen=True)
class Recommendation:
    """The recommended candidate.

    Attributes:
        recommended: the candidate to use.
        lowest: the candidate with the lowest mean loss.
        tied: the candidates statistically tied with it; includes `recommended`.
        headline: one sentence.
        reasons: one sentence each.
        warnings: reasons not to rely on it, one sentence each.
    """

    recommended: CandidateResult
    lowest: CandidateResult
    tied: Sequence[CandidateResult]
    headline: str
    reasons: Sequence[str]
    warnings: Sequence[str]


def recommend(candidates: Sequence[CandidateResult], base_general_loss: float | None = None) -> Recommendation | None:
    """Return the cheapest of the candidates that are tied with the lowest loss.

    Args:
        candidates: the results.
        base_general_loss: the base model's loss on general text.

    Returns:
        The recommendation; None if no run has finished.
    """
    finished = [candidate for candidate in candidates if candidate.best is not None]
    if not finished:
        return None
    lowest = min(finished, key=_mean_loss)
    tied = [candidate for candidate in finished if is_tied(lowest, candidate)]
    cheapest = min(candidate.cost for candidate in tied)
    recommended = min((one for one in tied if _EQUAL_COST * one.cost <= cheapest), key=_mean_loss)
    return Recommendation(
        recommended,
        lowest,
        tied,
        f"Recommended: {name_with_settings(recommended)}",
        _reasons(recommended, lowest, tied, finished),
        _warnings(recommended, lowest, candidates, base_general_loss),
    )


def is_tied(lowest: CandidateResult, other: CandidateResult) -> bool:
    """Return whether the loss of `other` is statistically tied with the lowest.

    Runs of one seed see the same examples in the same order, so the interval is that of their paired differences.
    """
    gap = loss_gap(lowest, other)
    if gap.margin is None:
        return gap.mean <= _SINGLE_SEED_NEGLIGIBLE * abs(_mean_loss(lowest))
    return gap.mean <= max(gap.margin, NEGLIGIBLE * abs(_mean_loss(lowest)))


def loss_gap(lowest: CandidateResult, other: CandidateResult) -> Estimate:
    """Return how far the loss of `other` is above the lowest.

    The seeds that both candidates have are paired.
    """
    seeds = lowest.losses.keys() & other.losses.keys()
    return estimate([other.losses[seed] - lowest.losses[seed] for seed in sorted(seeds)])


def name_with_settings(result: CandidateResult) -> str:
    """Return a candidate's name with its settings: `dora (lr 2e-4)`."""
    return f"{result.candidate.name} ({describe(result.settings)})"


def format_estimate(loss: Estimate) -> str:
    """Format a loss as `2.314 ± 0.021`, or without an interval as `2.314`."""
    return format_loss(loss.mean) if loss.margin is None else f"{format_loss(loss.mean)} ± {format_loss(loss.margin)}"


def format_loss(value: float) -> str:
    """Format a loss with three decimals; further digits are noise in every run."""
    return f"{value:.3f}"


def _mean_loss(result: CandidateResult) -> float:
    loss = result.loss
    assert loss is not None
    return loss.mean


def _reasons(
    recommended: CandidateResult,
    lowest: CandidateResult,
    tied: Sequence[CandidateResult],
    finished: Sequence[CandidateResult],
) -> list[str]:
    loss, best = recommended.loss, recommended.best
    assert loss is not None and best is not None
    before = "" if best.loss_before is None else f", from {format_loss(best.loss_before)} before training"
    reasons = [f"Its held-out loss is {format_estimate(loss)}{before}."]
    if recommended is lowest:
        reasons.append("It is the lowest." if len(finished) > 1 else "No other candidate has finished.")
    else:
        reasons.append(_tie_reason(recommended, lowest))
    others = [result for result in tied if result not in (recommended, lowest)]
    if recommended is lowest and (costly := [result for result in others if result.cost > recommended.cost]):
        costs = "; ".join(f"{result.candidate.name} {_relative_cost(result, recommended)}" for result in costly)
        reasons.append(f"Statistically tied, but more expensive: {costs}.")
    elif others:
        reasons.append(f"Also tied with the lowest: {', '.join(result.candidate.name for result in others)}.")
    behind = sorted((result for result in finished if result not in tied), key=_mean_loss)
    if behind:
        gaps = ", ".join(f"{result.candidate.name} ({loss_gap(lowest, result).mean:+.3f})" for result in behind)
        limit = format_percent(_SINGLE_SEED_NEGLIGIBLE) if loss.margin is None else "the noise"
        reasons.append(f"Higher by more than {limit}: {gaps}.")
    return reasons


def _tie_reason(recommended: CandidateResult, lowest: CandidateResult) -> str:
    """Explain why a candidate is recommended although another has a lower loss."""
    gap = _mean_loss(recommended) - _mean_loss(lowest)
    noise = loss_gap(lowest, recommended).margin
    if noise is None:
        limit = "too little to tell apart with one seed"
    elif gap <= noise:
        limit = f"within the noise (± {format_loss(noise)})"
    else:
        limit = f"less than {format_percent(NEGLIGIBLE)}"
    return (
        f"{name_with_settings(lowest)} is lower by {format_loss(gap)}, {limit}; "
        f"{recommended.candidate.name} {_relative_cost(recommended, lowest)}."
    )


def _relative_cost(result: CandidateResult, other: CandidateResult) -> str:
    """Compare the time and memory of `result` with those of `other`."""
    time = result.seconds_per_token / other.seconds_per_token
    memory = result.peak_memory_bytes / other.peak_memory_bytes
    return f"takes {_ratio(time, 'time')} and {_ratio(memory, 'memory')}"


def _ratio(value: float, quantity: str) -> str:
    return f"{value:.2g} times the {quantity}" if value >= 1 else f"{format_percent(value)} of the {quantity}"


def _warnings(
    recommended: CandidateResult,
    lowest: CandidateResult,
    candidates: Sequence[CandidateResult],
    base_general_loss: float | None,
) -> list[str]:
    warnings = []
    best, loss = recommended.best, recommended.loss
    assert best is not None and loss is not None
    if loss.seeds == 1:
        warnings.append("One seed gives no interval; differences below 1 % count as ties.")
    elif loss.seeds == 2:
        warnings.append("Two seeds give wide intervals; use three or more to tell close candidates apart.")
    tokens = [result.best.tokens for result in candidates if result.best is not None]
    if max(tokens) > _MAX_TOKEN_RATIO * min(tokens):
        warnings.append(
            f"The runs trained on between {format_count(min(tokens))} and {format_count(max(tokens))} tokens. "
            "Use `--budget tokens=N` to give every run the same number."
        )
    if best.loss_before is not None and loss.mean >= best.loss_before:
        warnings.append("Its held-out loss did not fall: no candidate learned from this data within the budget.")
    for result in candidates:
        end = result.lr_at_grid_end
        if end is not None and result in (recommended, lowest):
            direction = "lower" if end == "lowest" else "higher"
            warnings.append(
                f"The best learning rate of {result.candidate.name} is the {end} tried; "
                f"a {direction} one may be better."
            )
        if result.failures:
            warnings.append(
                f"{len(result.failures)} of {len(result.trials) + len(result.seed_runs)} runs of "
                f"{result.candidate.name} failed: {result.failures[0].failure}"
            )
    general_loss = recommended.evaluation.general_loss
    if general_loss is not None and base_general_loss and general_loss > (1 + _MAX_FORGETTING) * base_general_loss:
        rise = format_percent(general_loss / base_general_loss - 1)
        warnings.append(f"Its loss on general text rose by {rise}: it forgot some of what the base model knew.")
    if recommended.evaluation.merge == "differs":
        warnings.append("The merged model gives other results than the adapter: use the adapter unmerged.")
    return warnings
