"""Scores of held-out pairs, by which candidates of different objectives are compared.

Losses of different objectives have different units, and so have their rewards. A pair is therefore judged in one way
for all candidates: it is right where training raised the log-probability of its chosen answer by more than that of its
rejected one. For `dpo` that is the sign of the difference of its own rewards. All candidates are held against one
model, that of the start.
"""

from collections.abc import Sequence
from dataclasses import replace

from peftchat.comparing.measure import CaseScore, Measure
from peftchat.comparing.outcomes import CandidateResult, Estimate, RunResult
from peftchat.runs.eval_pairs import PairResult

_PLAIN = ("lora", "full")
"""Variants that begin as the base does."""


def value_of(candidate: CandidateResult, measure: Measure) -> Estimate | None:
    """Return what a candidate has reached over its seeds; None without a finished run."""
    return candidate.right if measure.is_share else candidate.loss


def wrong(run: RunResult, measure: Measure) -> float:
    """Return what counts against a run: its loss, or the share of cases that are wrong."""
    return run.loss if run.right is None or not measure.is_share else 1 - run.right


def with_scores(candidates: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Return the results with the scores of their held-out pairs, all against one start."""
    start = _start(candidates)
    return [
        replace(
            one,
            trials=[_scored(run, start) for run in one.trials],
            seed_runs=[_scored(run, start) for run in one.seed_runs],
        )
        for one in candidates
    ]


def _start(candidates: Sequence[CandidateResult]) -> dict[str, float]:
    """Return how much likelier each chosen answer was before training, by source; of the plainest candidate."""
    by_plainness = sorted(
        candidates,
        key=lambda one: one.candidate.variant not in _PLAIN or one.candidate.settings.get("method") == "qlora",
    )
    runs = (run for one in by_plainness for run in one.trials)
    return next((found for run in runs if (found := _before(run.pairs))), {})


def _before(pairs: Sequence[PairResult]) -> dict[str, float]:
    return {
        one.source: one.chosen_logp_before - one.rejected_logp_before
        for one in pairs
        if one.chosen_logp_before is not None and one.rejected_logp_before is not None
    }


def _scored(run: RunResult, start: dict[str, float]) -> RunResult:
    """Return a run with the scores of its pairs; by the run's own rewards where the start is not known."""
    if not run.pairs:
        return run
    known = all(one.source in start for one in run.pairs)
    scores = []
    for one in run.pairs:
        margin = one.chosen_logp - one.rejected_logp - start[one.source] if known else None
        decides = one.margin if margin is None else margin
        scores.append(CaseScore(one.source, (decides > 0) + 0.5 * (decides == 0), margin))
    return replace(run, scores=scores)
