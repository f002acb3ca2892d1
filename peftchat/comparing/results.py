"""What a comparison found, and the files that say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftchat.comparing.compare_plan import ComparePlan
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.outcomes import CandidateResult, Estimate, RunResult
from peftchat.comparing.recommend import Recommendation, is_tied, loss_gap, recommend
from peftchat.recipe import dump_recipe


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison, as far as it has come.

    Attributes:
        outcomes: one a candidate, in the order asked for.
        base_plain_loss: the untouched base's loss on plain text.
        recommendation: None until a run has ended well.
    """

    plan: ComparePlan
    outcomes: Sequence[CandidateResult]
    base_plain_loss: float | None
    recommendation: Recommendation | None

    @classmethod
    def of(
        cls, plan: ComparePlan, outcomes: Sequence[CandidateResult], base_plain_loss: float | None = None
    ) -> "ComparisonResult":
        """The result with its recommendation."""
        return cls(plan, outcomes, base_plain_loss, recommend(outcomes, base_plain_loss))

    def recommended_recipe(self, folder: ComparisonFolder) -> str:
        """The recipe to run, with the reasons at its head."""
        advice = self.recommendation
        assert advice is not None
        recipe = self.plan.recommended(advice.choice.candidate, advice.choice.settings)
        head = [f"    peftchat train {folder.recommended}", "", *advice.reasons, *advice.cautions]
        if self.plan.wish.budget is not None:
            head.append(f"Compared at {self.plan.wish.budget} a run; this recipe runs for its own length.")
        comment = "".join(f"# {line}".rstrip() + "\n" for line in ("", *head, ""))
        return comment + dump_recipe(recipe)

    def as_dict(self, folder: ComparisonFolder) -> dict[str, Any]:
        """Plain values, for JSON."""
        advice, budget = self.recommendation, self.plan.wish.budget
        return {
            "folder": str(folder.path),
            "report": str(folder.report),
            "recipe": str(self.plan.wish.recipe),
            "budget": None if budget is None else str(budget),
            "seeds": self.plan.seeds,
            "base_plain_loss": self.base_plain_loss,
            "candidates": [self._candidate(outcome, folder) for outcome in self.outcomes],
            "recommendation": advice
            and {
                "name": advice.choice.candidate.name,
                "settings": {**advice.choice.candidate.settings, **advice.choice.settings},
                "lowest": advice.lowest.candidate.name,
                "tied": [outcome.candidate.name for outcome in advice.tied],
                "headline": advice.headline,
                "reasons": list(advice.reasons),
                "cautions": list(advice.cautions),
                "recipe": str(folder.recommended),
            },
        }

    def _candidate(self, outcome: CandidateResult, folder: ComparisonFolder) -> dict[str, Any]:
        said: dict[str, Any] = {
            "name": outcome.candidate.name,
            "settings": {**outcome.candidate.settings, **outcome.settings},
            "loss": _estimate(outcome.loss),
            "tried": [_record(record, folder) for record in outcome.tried],
            "repeats": [_record(record, folder) for record in outcome.repeats],
        }
        best, advice, measured = outcome.best, self.recommendation, outcome.measured
        if best is None or advice is None:
            return said
        return said | {
            "above_lowest": _estimate(loss_gap(advice.lowest, outcome)),
            "tied": is_tied(advice.lowest, outcome),
            "loss_before": best.loss_before,
            "tokens": best.tokens,
            "seconds": outcome.seconds,
            "tokens_per_second": outcome.tokens_per_second,
            "peak_memory_bytes": outcome.peak_memory_bytes,
            "trainable_parameters": best.trainable_parameters,
            "weights_bytes": best.weights_bytes,
            "plain_loss": measured.plain_loss,
            "merge": measured.merge,
            "merge_words": measured.merge_words,
            "answers": [{"prompt": prompt, "answer": text, "stopped": end} for prompt, text, end in measured.answers],
            "not_measured": measured.failure,
        }


def _estimate(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else {"mean": value.mean, "margin": value.margin, "seeds": value.count}


def _record(record: RunResult, folder: ComparisonFolder) -> dict[str, Any]:
    said = {"run": str(folder.run(record.job.name)), "settings": dict(record.job.settings), "seed": record.job.seed}
    if record.failure is not None:
        return said | {"failure": record.failure, "log": str(folder.log(record.job.name))}
    return said | {"loss": record.loss, "seconds": record.seconds, "tokens": record.tokens}
