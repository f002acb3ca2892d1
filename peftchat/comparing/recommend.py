"""Recommendation of a candidate, with its reasons and warnings."""

from collections.abc import Sequence
from dataclasses import dataclass

from peftchat.comparing.candidates import describe
from peftchat.comparing.evidence import Clusters, Evidence, forgetting_gap
from peftchat.comparing.measure import LOSS, Measure
from peftchat.comparing.outcomes import CandidateResult
from peftchat.comparing.paired_statistics import NEGLIGIBLE, Gap
from peftchat.comparing.task_evidence import TaskEvidence
from peftchat.comparing.task_reasons import split_by_tasks, task_reasons, task_warnings
from peftchat.formatting import format_count, format_percent

_EQUAL_COST = 0.95
"""Costs whose ratio is above this count as equal, since timings vary by as much."""

MAX_FORGETTING = 0.05
"""Relative rise of the loss on general text from which on forgetting counts."""

_SAME = 0.03
"""Ratios this close to 1 are told as equal."""

_MAX_TOKEN_RATIO = 1.1
"""Ratio of the most to the fewest tokens of a run above which a warning is given."""

_HALF = 0.5
"""Share of cases that are wrong where nothing was learned."""

_FEW_CLUSTERS = 20
"""Independent groups of held-out conversations below which a warning is given."""


@dataclass(frozen=True)
class Recommendation:
    """The recommended candidate.

    Attributes:
        recommended: the candidate to use.
        lowest: the candidate with the lowest mean loss.
        tied: the candidates statistically tied with it; includes `recommended`.
        evidence: the paired losses.
        headline: one sentence.
        reasons: one sentence each.
        warnings: reasons not to rely on it, one sentence each.
    """

    recommended: CandidateResult
    lowest: CandidateResult
    tied: Sequence[CandidateResult]
    evidence: Evidence
    headline: str
    reasons: Sequence[str]
    warnings: Sequence[str]


def recommend(
    candidates: Sequence[CandidateResult],
    base_general_loss: float | None = None,
    clusters: Clusters | None = None,
    negligible: float = NEGLIGIBLE,
    tasks: TaskEvidence | None = None,
    measure: Measure = LOSS,
) -> Recommendation | None:
    """Return plain LoRA if no other candidate is certainly better, else the cheapest of those that are tied.

    Where shares of right pairs or answers are compared, it is the one with the most right instead of the cheapest.
    Of the tied candidates, those that certainly forget more than another one of them are set aside first. Then it is
    those that are certainly worse on a task than another one that is left.

    Args:
        candidates: the results.
        base_general_loss: the base model's loss on general text.
        clusters: which held-out conversations belong together; None if none do.
        negligible: fraction of the lowest loss up to which losses count as equal, or a difference of shares.
        tasks: the scores on tasks; None if none were asked.
        measure: what candidates are compared by.

    Returns:
        The recommendation; None if no run has finished.
    """
    evidence = Evidence.of(candidates, clusters, negligible, measure)
    if evidence is None:
        return None
    tied = evidence.tied
    remembering = [one for one in tied if not _forgets_more(one, tied, base_general_loss)]
    tasks = tasks or TaskEvidence((), {}, {})
    staying, aside = split_by_tasks([one.candidate.name for one in remembering], tasks)
    left = [one for one in remembering if one.candidate.name in staying]
    plain = [one for one in left if _is_plain_lora(one)]
    # Objectives cost about the same, and few pairs let much tie: there the most right decides.
    recommended = min(plain or left, key=evidence.loss) if measure.is_share else _cheapest(plain or left, evidence)
    name, names = recommended.candidate.name, [one.candidate.name for one in tied]
    forgetful = [one for one in tied if one not in remembering]
    return Recommendation(
        recommended,
        evidence.lowest,
        tied,
        evidence,
        f"Recommended: {name_with_settings(recommended)}",
        [*_reasons(recommended, evidence, tied, forgetful, candidates), *task_reasons(name, names, aside, tasks)],
        [*_warnings(recommended, evidence, candidates, base_general_loss), *task_warnings(name, tasks)],
    )


def _is_plain_lora(result: CandidateResult) -> bool:
    return result.candidate.variant == "lora" and result.candidate.settings.get("method") != "qlora"


def _cheapest(candidates: Sequence[CandidateResult], evidence: Evidence) -> CandidateResult:
    """Return the cheapest candidate; of those that cost about the same, the one with the lowest loss."""
    cheapest = min(one.cost for one in candidates)
    return min((one for one in candidates if _EQUAL_COST * one.cost <= cheapest), key=evidence.loss)


def _forgets_more(result: CandidateResult, others: Sequence[CandidateResult], base: float | None) -> bool:
    """Return whether a candidate certainly forgets more than another one, by more than a rise that is allowed."""
    for other in others:
        gap = forgetting_gap(other, result)
        if gap is None or gap.margin is None or base is None:
            continue
        if gap.mean > max(gap.margin, MAX_FORGETTING * abs(base)):
            return True
    return False


def name_with_settings(result: CandidateResult) -> str:
    """Return a candidate's name with its settings: `dora (lr 2e-4)`."""
    settings = describe(result.settings)
    return f"{result.candidate.name} ({settings})" if settings else result.candidate.name


def _reasons(
    recommended: CandidateResult,
    evidence: Evidence,
    tied: Sequence[CandidateResult],
    forgetful: Sequence[CandidateResult],
    candidates: Sequence[CandidateResult],
) -> list[str]:
    lowest, is_share = evidence.lowest, evidence.measure.is_share
    reasons = [_result(recommended, evidence)]
    others = [one for one in tied if one is not recommended]
    if len(evidence.candidates) == 1:
        others_ran = len(candidates) > 1
        reasons.append("No other candidate has finished." if others_ran else "It is the only candidate.")
    elif not others:
        what = "These are more than of every" if is_share else "It is lower than that of every"
        reasons.append(f"{what} other candidate, by more than the noise.")
    else:
        names = ", ".join(one.candidate.name for one in tied)
        everything = " All candidates tie." if len(tied) == len(evidence.candidates) else ""
        reasons.append(f"These tie: {names}.{everything}")
        if recommended is not lowest:
            reasons.append(_tie_reason(recommended, evidence))
        if _is_plain_lora(recommended):
            reasons.append(
                "Of candidates that tie, plain LoRA is recommended: every tool can load, merge and serve it."
            )
        cheaper = [one for one in others if one.cost < _EQUAL_COST * recommended.cost]
        if cheaper:
            costs = "; ".join(f"{one.candidate.name} {_relative_cost(one, recommended)}" for one in cheaper)
            reasons.append(f"Tied with it and cheaper: {costs}.")
    reasons += [_forgetful_reason(one, recommended) for one in forgetful]
    if trade := _trade_off(recommended, evidence):
        reasons.append(trade)
    behind = sorted((one for one in evidence.candidates if one not in tied), key=evidence.loss)
    if behind:
        gaps = ", ".join(f"{one.candidate.name} ({_shown_gap(evidence, one)})" for one in behind)
        reasons.append(f"{'Behind' if is_share else 'Higher'} by more than the noise: {gaps}.")
    return [*reasons, _basis(evidence)] if len(evidence.candidates) > 1 else reasons


def _result(recommended: CandidateResult, evidence: Evidence) -> str:
    """State what the recommended candidate has reached."""
    best, measure = recommended.best, evidence.measure
    assert best is not None
    reached = measure.format_wrong(evidence.loss(recommended))
    if not measure.is_share:
        before = "" if best.loss_before is None else f", from {measure.format(best.loss_before)} before training"
        return f"Its held-out loss is {reached}{before}."
    margin = "" if recommended.margin is None else f", with a mean margin of {recommended.margin:+.3f} nats"
    return f"Of the held-out {measure.cases}, {reached} are right{margin}."


def _shown_gap(evidence: Evidence, result: CandidateResult) -> str:
    gap = evidence.gap(evidence.lowest, result)
    return "" if gap is None else evidence.measure.format_gap(gap)


def _tie_reason(recommended: CandidateResult, evidence: Evidence) -> str:
    """Explain why a candidate is recommended although another has a lower loss."""
    lowest, measure = evidence.lowest, evidence.measure
    gap = evidence.gap(lowest, recommended)
    assert gap is not None
    if gap.margin_together is None:
        limit = f"which too few {measure.cases} cannot tell from noise"
    elif gap.mean <= gap.margin_together:
        limit = f"within the noise (± {measure.format_difference(gap.margin_together)})"
    else:
        limit = f"less than the {measure.format_difference(evidence.threshold)} that count as equal"
    how = "has more right" if measure.is_share else "is lower"
    return (
        f"{name_with_settings(lowest)} {how} by {measure.format_difference(gap.mean)}, {limit}; "
        f"{recommended.candidate.name} {_relative_cost(recommended, lowest)}."
    )


def _forgetful_reason(result: CandidateResult, recommended: CandidateResult) -> str:
    gap = forgetting_gap(recommended, result)
    assert gap is not None
    margin = "" if gap.margin is None else f" ± {LOSS.format(gap.margin)}"
    return f"{result.candidate.name} is set aside: its loss on general text is {gap.mean:+.3f}{margin} against that."


def _trade_off(recommended: CandidateResult, evidence: Evidence) -> str | None:
    """State what another candidate would keep of the base's knowledge, and what that costs on the held-out data."""
    least: tuple[float, CandidateResult, Gap] | None = None
    for other in evidence.candidates:
        gap = forgetting_gap(other, recommended)
        if other is recommended or gap is None or gap.margin is None or gap.mean <= gap.margin:
            continue
        if least is None or gap.mean > least[0]:
            least = gap.mean, other, gap
    if least is None:
        return None
    _, other, forgotten = least
    cost = evidence.gap(recommended, other)
    assert cost is not None and forgotten.margin is not None
    return (
        f"Trade-off: {other.candidate.name} forgets less. Its loss on general text is lower by {forgotten.mean:.3f} ± "
        f"{LOSS.format(forgotten.margin)}, and its {evidence.measure.value_name} differs by "
        f"{evidence.measure.format_gap(cost)}."
    )


def _basis(evidence: Evidence) -> str:
    """Say what the intervals contain and what they do not."""
    paired, measure = evidence.paired, evidence.measure
    threshold = measure.format_difference(evidence.threshold)
    share = format_percent(evidence.threshold / abs(float(paired.losses.min()))) if not measure.is_share else ""
    equal = f"Differences up to {threshold}{f' ({share})' if share else ''} count as equal."
    if not evidence.by_conversation:
        return f"The runs keep no losses by conversation, so that there is no interval. {equal}"
    if paired.num_clusters < 2:
        return f"All held-out {measure.cases} belong together, so that there is no interval. {equal}"
    cases = (
        f"{format_count(paired.num_conversations)} held-out {measure.cases} in {format_count(paired.num_clusters)} "
        "independent groups"
    )
    how = f" {measure.explanation}" if measure.explanation else ""
    if paired.num_seeds == 1:
        added = f"{threshold} ({share} of the loss) is" if share else f"{threshold} are"
        return (
            f"Intervals (95 %, for all pairs of candidates at once) are over {cases}. They do not contain the noise of "
            f"runs, which one seed does not show; {added} added for it.{how}"
        )
    return (
        f"Intervals (95 %, for all pairs of candidates at once) are over {cases} and {paired.num_seeds} seeds. "
        f"{equal}{how}"
    )


def _relative_cost(result: CandidateResult, other: CandidateResult) -> str:
    """Compare the time and memory of `result` with those of `other`."""
    time = result.seconds_per_token / other.seconds_per_token
    memory = result.peak_memory_bytes / max(1, other.peak_memory_bytes)
    return f"takes {_ratio(time, 'time')} and {_ratio(memory, 'memory')}"


def _ratio(value: float, quantity: str) -> str:
    if abs(value - 1) < _SAME:
        return f"as much {quantity}"
    return f"{value:.2g} times the {quantity}" if value >= 1 else f"{format_percent(value)} of the {quantity}"


def _warnings(
    recommended: CandidateResult,
    evidence: Evidence,
    candidates: Sequence[CandidateResult],
    base_general_loss: float | None,
) -> list[str]:
    warnings = []
    best, paired = recommended.best, evidence.paired
    assert best is not None
    if len(evidence.candidates) > 1:
        if not evidence.by_conversation:
            warnings.append("Runs of an older version keep no losses by conversation; compare in another folder.")
        elif paired.num_clusters < 2:
            cases = evidence.measure.cases
            warnings.append(f"All held-out {cases} belong together: nothing can be told apart. Hold out more.")
        elif paired.effective_clusters < _FEW_CLUSTERS:
            warnings.append(
                f"The held-out {evidence.measure.cases} say as much as {paired.effective_clusters:.0f} independent "
                "ones of equal length. Hold out more to tell closer candidates apart."
            )
        if paired.num_seeds == 1:
            warnings.append("One seed does not show the noise of runs; use `--seeds 3` or more.")
    incomplete = [one for one in candidates if one.runs and one not in evidence.candidates]
    if incomplete:
        names = ", ".join(one.candidate.name for one in incomplete)
        warnings.append(f"Not compared, as a seed of theirs failed: {names}.")
    tokens = [result.best.tokens for result in candidates if result.best is not None]
    if max(tokens) > _MAX_TOKEN_RATIO * min(tokens):
        warnings.append(
            f"The runs trained on between {format_count(min(tokens))} and {format_count(max(tokens))} tokens. "
            "Use `--budget tokens=N` to give every run the same number."
        )
    if evidence.measure.is_share:
        if evidence.loss(recommended) >= _HALF:
            warnings.append("No more than half are right: no candidate learned from this data within the budget.")
    elif best.loss_before is not None and evidence.loss(recommended) >= best.loss_before:
        warnings.append("Its held-out loss did not fall: no candidate learned from this data within the budget.")
    for result in candidates:
        end = result.lr_at_grid_end
        if end is not None and (result is recommended or result in evidence.tied):
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
    if general_loss is not None and base_general_loss and general_loss > (1 + MAX_FORGETTING) * base_general_loss:
        rise = format_percent(general_loss / base_general_loss - 1)
        warnings.append(f"Its loss on general text rose by {rise}: it forgot some of what the base model knew.")
    if recommended.evaluation.merge == "differs":
        warnings.append("The merged model gives other results than the adapter: use the adapter unmerged.")
    return warnings
