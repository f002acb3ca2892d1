"""Which candidate to take, and why, in words that the numbers carry."""

from collections.abc import Sequence
from dataclasses import dataclass

from peftchat.comparing.candidates import describe
from peftchat.comparing.outcomes import CandidateResult, Estimate, estimate
from peftchat.formatting import format_count, format_percent

NEGLIGIBLE = 0.005
"""A difference below this share of the lower loss is a tie, however sure it is."""

_UNSURE = 0.01
"""The same where there is one seed, and so no interval."""

_CHEAPER = 0.95
"""Costs nearer to each other than this are equal: timings vary by as much."""

_FORGETTING = 0.05

_UNEVEN = 1.1


@dataclass(frozen=True)
class Recommendation:
    """What to take.

    Attributes:
        choice: the candidate.
        lowest: the one with the lowest mean loss.
        tied: those that cannot be told from it, `choice` among them.
        headline: one sentence.
        reasons: why, one sentence each.
        cautions: what speaks against relying on it.
    """

    choice: CandidateResult
    lowest: CandidateResult
    tied: Sequence[CandidateResult]
    headline: str
    reasons: Sequence[str]
    cautions: Sequence[str]


def recommend(outcomes: Sequence[CandidateResult], base_plain_loss: float | None = None) -> Recommendation | None:
    """The cheapest of the candidates whose loss cannot be told from the lowest; None if no run ended well.

    Args:
        base_plain_loss: the base's loss on plain text.
    """
    finished = [outcome for outcome in outcomes if outcome.best is not None]
    if not finished:
        return None
    lowest = min(finished, key=_mean)
    tied = [outcome for outcome in finished if is_tied(lowest, outcome)]
    cheapest = min(outcome.cost for outcome in tied)
    choice = min((outcome for outcome in tied if _CHEAPER * outcome.cost <= cheapest), key=_mean)
    return Recommendation(
        choice,
        lowest,
        tied,
        f"Take {named(choice)}.",
        list(_reasons(choice, lowest, tied, finished)),
        list(_warnings(choice, lowest, outcomes, base_plain_loss)),
    )


def is_tied(lowest: CandidateResult, other: CandidateResult) -> bool:
    """Whether `other` may well be as good as `lowest`.

    Runs of one seed saw the same rows in the same order, so the interval is that of their differences.
    """
    difference = loss_gap(lowest, other)
    if difference.margin is None:
        return difference.mean <= _UNSURE * abs(_mean(lowest))
    return difference.mean <= max(difference.margin, NEGLIGIBLE * abs(_mean(lowest)))


def loss_gap(lowest: CandidateResult, other: CandidateResult) -> Estimate:
    """By how much the loss of `other` is higher, over the seeds that both have."""
    seeds = lowest.losses.keys() & other.losses.keys()
    return estimate([other.losses[seed] - lowest.losses[seed] for seed in sorted(seeds)])


def named(outcome: CandidateResult) -> str:
    """A candidate and its settings: `dora (lr 2e-4)`."""
    return f"{outcome.candidate.name} ({describe(outcome.settings)})"


def loss_words(loss: Estimate) -> str:
    """`2.314 ± 0.021`, or the value alone where there is no interval."""
    return thousandths(loss.mean) if loss.margin is None else f"{thousandths(loss.mean)} ± {thousandths(loss.margin)}"


def thousandths(value: float) -> str:
    """A loss or a difference of losses to three digits after the point: what is beyond them is noise in every run."""
    return f"{value:.3f}"


def _mean(outcome: CandidateResult) -> float:
    loss = outcome.loss
    assert loss is not None
    return loss.mean


def _reasons(
    choice: CandidateResult,
    lowest: CandidateResult,
    tied: Sequence[CandidateResult],
    finished: Sequence[CandidateResult],
) -> list[str]:
    loss, best = choice.loss, choice.best
    assert loss is not None and best is not None
    before = "" if best.loss_before is None else f", from {thousandths(best.loss_before)} before training"
    reasons = [f"Its held-out loss is {loss_words(loss)}{before}."]
    if choice is lowest:
        reasons.append("No other has a lower one." if len(finished) > 1 else "Nothing else was there to compare with.")
    else:
        lower = _mean(choice) - _mean(lowest)
        noise = loss_gap(lowest, choice).margin
        if noise is None:
            within = "which one seed cannot tell apart"
        elif lower <= noise:
            within = f"which is within the noise (± {thousandths(noise)})"
        else:
            within = f"which is under {format_percent(NEGLIGIBLE)} of it"
        reasons.append(
            f"{named(lowest)} is lower by {thousandths(lower)}, {within}; "
            f"{choice.candidate.name} {_cost_words(choice, lowest)}."
        )
    others = [outcome for outcome in tied if outcome not in (choice, lowest)]
    if choice is lowest and (dearer := [outcome for outcome in others if outcome.cost > choice.cost]):
        told = "; ".join(f"{outcome.candidate.name} {_cost_words(outcome, choice)}" for outcome in dearer)
        reasons.append(f"Not to be told from it, and dearer: {told}.")
    elif others:
        reasons.append(f"Not to be told from the lowest either: {', '.join(one.candidate.name for one in others)}.")
    behind = sorted((outcome for outcome in finished if outcome not in tied), key=_mean)
    if behind:
        told = ", ".join(f"{one.candidate.name} ({loss_gap(lowest, one).mean:+.3f})" for one in behind)
        by = format_percent(_UNSURE) if loss.margin is None else "the noise"
        reasons.append(f"Behind by more than {by}: {told}.")
    return reasons


def _cost_words(one: CandidateResult, other: CandidateResult) -> str:
    """How the time and memory of `one` stand to those of `other`."""
    time = one.seconds_per_token / other.seconds_per_token
    memory = one.peak_memory_bytes / other.peak_memory_bytes
    parts = [_ratio(time, "of the time"), _ratio(memory, "of the memory")]
    return f"takes {' and '.join(parts)}"


def _ratio(value: float, what: str) -> str:
    return f"{value:.2g} times {what.removeprefix('of ')}" if value >= 1 else f"{format_percent(value)} {what}"


def _warnings(
    choice: CandidateResult, lowest: CandidateResult, outcomes: Sequence[CandidateResult], base_plain_loss: float | None
) -> list[str]:
    found = []
    best, loss = choice.best, choice.loss
    assert best is not None and loss is not None
    if loss.count == 1:
        found.append("One seed: there is no interval, and differences under 1 % were taken for ties.")
    elif loss.count == 2:
        found.append("Two seeds: the intervals are wide, and little can be told apart. Three or more say more.")
    tokens = [outcome.best.tokens for outcome in outcomes if outcome.best is not None]
    if max(tokens) > _UNEVEN * min(tokens):
        found.append(
            f"The variants saw between {format_count(min(tokens))} and {format_count(max(tokens))} tokens: "
            "with `--budget tokens=N` all see as many."
        )
    if best.loss_before is not None and loss.mean >= best.loss_before:
        found.append("Its held-out loss did not fall: nothing here learned from these rows within the budget.")
    for outcome in outcomes:
        if outcome.edge is not None and outcome in (choice, lowest):
            found.append(
                f"The best learning rate of {outcome.candidate.name} is the {outcome.edge} tried: "
                f"one that is still {'lower' if outcome.edge == 'lowest' else 'higher'} may do better."
            )
        if outcome.failures:
            record = outcome.failures[0]
            found.append(
                f"{len(outcome.failures)} of {len(outcome.tried) + len(outcome.repeats)} runs of "
                f"{outcome.candidate.name} failed: {record.failure}"
            )
    plain = choice.measured.plain_loss
    if plain is not None and base_plain_loss and plain > (1 + _FORGETTING) * base_plain_loss:
        rise = format_percent(plain / base_plain_loss - 1)
        found.append(f"Its loss on plain text rose by {rise}: it has forgotten some of what the base knew.")
    if choice.measured.merge == "differs":
        found.append("Merged into its base it computes something else: use the adapter as it is.")
    return found
