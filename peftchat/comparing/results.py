"""Result of a comparison, and its summary in `comparison.json`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from peftchat.comparing.candidates import OBJECTIVE, is_of_all
from peftchat.comparing.compare_plan import ComparePlan
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.evidence import Clusters, Evidence, forgetting_gap
from peftchat.comparing.measure import Measure, measure_of
from peftchat.comparing.outcomes import CandidateResult, Estimate, MergeResult, RunResult
from peftchat.comparing.pair_scores import with_scores
from peftchat.comparing.recommend import Recommendation, recommend
from peftchat.comparing.task_evidence import TaskEvidence
from peftchat.comparing.task_scores import TaskScore
from peftchat.files import write_text
from peftchat.recipe import dump_recipe
from peftchat.runs.run_summary import SampleAnswer


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison with all results so far.

    Attributes:
        plan: the plan of the comparison.
        candidates: the result of each candidate, in the order of the options.
        base_general_loss: the loss of the untrained base model on general text.
        recommendation: None until a run has finished.
        tasks: the scores on tasks, if any were asked.
    """

    plan: ComparePlan
    candidates: Sequence[CandidateResult]
    base_general_loss: float | None
    recommendation: Recommendation | None
    tasks: TaskEvidence

    @classmethod
    def of(
        cls,
        plan: ComparePlan,
        candidates: Sequence[CandidateResult],
        base_general_loss: float | None = None,
        clusters: Clusters | None = None,
        base_tasks: Sequence[TaskScore] = (),
    ) -> "ComparisonResult":
        """Return the result with its recommendation."""
        candidates, measure = with_scores(candidates), measure_of(plan.base.recipe)
        tasks = TaskEvidence.of(candidates, base_tasks)
        advice = recommend(candidates, base_general_loss, clusters, plan.options.negligible, tasks, measure)
        return cls(plan, candidates, base_general_loss, advice, tasks)

    @property
    def measure(self) -> Measure:
        """What candidates are compared by."""
        return measure_of(self.plan.base.recipe)

    @property
    def losses_are_alike(self) -> bool:
        """Whether all candidates have one objective with the same options, so that losses can be drawn together."""
        keys = {key for one in self.candidates for key in one.candidate.settings}
        own = {key for key in keys if key == OBJECTIVE or not is_of_all(key)}
        found = [{key: one.candidate.settings.get(key) for key in own} for one in self.candidates]
        return all(one == found[0] for one in found)

    def recommended_recipe(self, folder: ComparisonFolder) -> str:
        """Return the recommended recipe as YAML, with the reasons as a comment on top."""
        recommendation = self.recommendation
        assert recommendation is not None
        recommended, budget = recommendation.recommended, self.plan.options.budget
        recipe = self.plan.recommended_recipe(recommended.candidate, recommended.settings)
        head = [f"    peftchat train {folder.recommended}", "", *recommendation.reasons, *recommendation.warnings]
        if budget is not None:
            head.append(f"The comparison trained {budget} per run; this recipe keeps its own length.")
        comment = "".join(f"# {line}".rstrip() + "\n" for line in ("", *head, ""))
        return comment + dump_recipe(recipe)


class _Summary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class TrialSummary(_Summary):
    """One training run of a candidate.

    Attributes:
        run: the run folder.
        settings: the settings that this run tried.
        share: its length as a part of a full run's.
        loss: held-out loss in nats per supervised token, or that of the objective; None if the run failed.
        right: the share of held-out pairs or labeled answers that are right.
        seconds, tokens: of training.
        failure: why it failed, in one line.
        log: the output of a failed run.
    """

    run: str
    settings: dict[str, Any]
    seed: int
    share: float = 1.0
    loss: float | None = None
    right: float | None = None
    seconds: float | None = None
    tokens: int | None = None
    failure: str | None = None
    log: str | None = None

    @classmethod
    def of(cls, result: RunResult, folder: ComparisonFolder) -> Self:
        """Summarize the result of a run."""
        job = result.job
        summary = cls(run=str(folder.run(job.name)), settings=dict(job.settings), seed=job.seed, share=job.share)
        if result.failure is not None:
            return summary.model_copy(update={"failure": result.failure, "log": str(folder.log(job.name))})
        return summary.model_copy(
            update={
                "loss": result.loss,
                "right": result.right,
                "seconds": result.seconds,
                "tokens": result.tokens,
            }
        )


class TaskSummary(_Summary):
    """The score of a candidate, or of the base, on a task.

    Attributes:
        score: the mean over questions and seeds.
        stderr: its standard error, over questions.
        gap: how much worse it is than the best candidate on this task.
        gap_margin: half the interval that holds for all pairs and tasks at once.
        below_base: how much worse it is than the base.
        below_base_margin: half the interval that holds for all tasks at once.
    """

    task: str
    metric: str
    higher_is_better: bool
    questions: int
    clusters: int
    seeds: int
    score: float
    stderr: float | None
    gap: float | None = None
    gap_margin: float | None = None
    below_base: float | None = None
    below_base_margin: float | None = None

    @classmethod
    def all_of(cls, name: str, evidence: TaskEvidence) -> "tuple[TaskSummary, ...]":
        """Summarize the scores of a candidate; `base` is the base."""
        found = []
        against = evidence.against_base.get(name, ())
        if name == "base":
            against = next(iter(evidence.against_base.values()), ())
        for place, task in enumerate(evidence.tasks):
            beside = against[place] if against else None
            score = task.score(name) or (beside.score(name) if beside is not None else None)
            if score is None:
                continue
            gap = task.gap(task.best, name)
            below = None if beside is None or name == "base" else beside.gap("base", name)
            found.append(
                cls(
                    task=task.task, metric=task.metric, higher_is_better=task.higher_is_better,
                    questions=task.questions, clusters=task.clusters, seeds=task.seeds, score=score[0], stderr=score[1],
                    gap=None if gap is None else gap.mean, gap_margin=None if gap is None else gap.margin,
                    below_base=None if below is None else below.mean,
                    below_base_margin=None if below is None else below.margin,
                )
            )  # fmt: skip
        return tuple(found)


class CandidateSummary(_Summary):
    """The results of one candidate.

    Without a finished run, everything after `seed_runs` is None.

    Attributes:
        loss: held-out loss over the seeds.
        right: the share of held-out pairs or labeled answers that are right, over the seeds.
        margin: mean margin of the held-out pairs, in nats.
        own_right: the share that is right by the objective's own reward.
        trials: one run per settings tried, on the first seed.
        seed_runs: runs with the best settings on the other seeds.
        loss_gap: how much its loss is above the lowest, with the interval of this pair alone; where candidates are
            compared by shares, how much higher its share of wrong cases is.
        loss_gap_margin_together: half the interval that holds for all pairs at once.
        forgetting_gap: how much its loss on general text is above that of the recommended candidate.
        tied: whether it is statistically tied with the lowest.
        loss_before: held-out loss before training.
        general_loss: loss on general text after training.
        merge: whether the merged model computes the same.
        evaluation_error: why the evaluation failed.
        tasks: its scores on tasks.
        task_error: why it could not be asked.
    """

    name: str
    settings: dict[str, Any]
    loss: Estimate | None
    right: Estimate | None = None
    margin: float | None = None
    own_right: float | None = None
    trials: tuple[TrialSummary, ...]
    seed_runs: tuple[TrialSummary, ...]
    loss_gap: Estimate | None = None
    loss_gap_margin_together: float | None = None
    forgetting_gap: Estimate | None = None
    tied: bool | None = None
    loss_before: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    weights_bytes: int | None = None
    general_loss: float | None = None
    merge: MergeResult | None = None
    merge_message: str | None = None
    answers: tuple[SampleAnswer, ...] | None = None
    evaluation_error: str | None = None
    tasks: tuple[TaskSummary, ...] = ()
    task_error: str | None = None

    @classmethod
    def of(
        cls,
        result: CandidateResult,
        recommendation: Recommendation | None,
        folder: ComparisonFolder,
        tasks: TaskEvidence,
    ) -> Self:
        """Summarize the result of a candidate."""
        summary = cls(
            name=result.candidate.name,
            settings={**result.candidate.settings, **result.settings},
            loss=result.loss,
            right=result.right,
            margin=result.margin,
            own_right=result.own_right,
            trials=tuple(TrialSummary.of(run, folder) for run in result.trials),
            seed_runs=tuple(TrialSummary.of(run, folder) for run in result.seed_runs),
        )
        best, evaluation = result.best, result.evaluation
        if best is None or recommendation is None:
            return summary
        evidence = recommendation.evidence
        gap, forgotten = evidence.gap(evidence.lowest, result), forgetting_gap(recommendation.recommended, result)
        return summary.model_copy(
            update={
                "loss_gap": None if gap is None else Estimate(gap.mean, gap.margin, evidence.paired.num_seeds),
                "loss_gap_margin_together": None if gap is None else gap.margin_together,
                "forgetting_gap": None if forgotten is None else Estimate(forgotten.mean, forgotten.margin, 1),
                "tied": any(result is one for one in recommendation.tied),
                "loss_before": best.loss_before,
                "tokens": best.tokens,
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "peak_memory_bytes": result.peak_memory_bytes,
                "trainable_parameters": best.trainable_parameters,
                "weights_bytes": best.weights_bytes,
                "general_loss": evaluation.general_loss,
                "merge": evaluation.merge,
                "merge_message": evaluation.merge_message,
                "answers": evaluation.answers,
                "evaluation_error": evaluation.error,
                "tasks": TaskSummary.all_of(result.candidate.name, tasks),
                "task_error": result.task_error,
            }
        )


class RecommendationSummary(_Summary):
    """The recommended candidate, by name.

    Attributes:
        settings: its recipe keys.
        lowest: the candidate with the lowest loss.
        tied: the candidates that are statistically tied with it.
        recipe: the file with the recommended recipe.
    """

    name: str
    settings: dict[str, Any]
    lowest: str
    tied: tuple[str, ...]
    headline: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    recipe: str

    @classmethod
    def of(cls, recommendation: Recommendation, folder: ComparisonFolder) -> Self:
        """Summarize a recommendation."""
        recommended = recommendation.recommended
        return cls(
            name=recommended.candidate.name,
            settings={**recommended.candidate.settings, **recommended.settings},
            lowest=recommendation.lowest.candidate.name,
            tied=tuple(result.candidate.name for result in recommendation.tied),
            headline=recommendation.headline,
            reasons=tuple(recommendation.reasons),
            warnings=tuple(recommendation.warnings),
            recipe=str(folder.recommended),
        )


class EvidenceSummary(_Summary):
    """What the statistics are based on.

    Attributes:
        measure: what candidates are compared by: `loss`, `pairs_right` or `answers_right`.
        conversations: held-out conversations, pairs or labeled answers.
        clusters: independent groups of them.
        effective_clusters: groups of equal length that would say as much.
        seeds: seeds that all candidates have.
        threshold: the difference up to which candidates count as equal.
    """

    measure: str = "loss"
    conversations: int
    clusters: int
    effective_clusters: float
    seeds: int
    threshold: float

    @classmethod
    def of(cls, evidence: Evidence) -> Self:
        """Summarize the evidence."""
        paired = evidence.paired
        return cls(
            measure=evidence.measure.key,
            conversations=paired.num_conversations if evidence.by_conversation else 0,
            clusters=paired.num_clusters if evidence.by_conversation else 0,
            effective_clusters=paired.effective_clusters if evidence.by_conversation else 0.0,
            seeds=paired.num_seeds,
            threshold=evidence.threshold,
        )


class ComparisonSummary(_Summary):
    """The summary of a comparison; `comparison.json` on disk."""

    folder: str
    report: str
    recipe: str
    budget: str | None
    seeds: tuple[int, ...]
    base_general_loss: float | None
    candidates: tuple[CandidateSummary, ...]
    recommendation: RecommendationSummary | None
    evidence: EvidenceSummary | None = None
    base_tasks: tuple[TaskSummary, ...] = ()

    @classmethod
    def of(cls, result: ComparisonResult, folder: ComparisonFolder) -> Self:
        """Summarize the result of a comparison in a folder."""
        recommendation, budget = result.recommendation, result.plan.options.budget
        return cls(
            folder=str(folder.path),
            report=str(folder.report),
            recipe=str(result.plan.options.recipe),
            budget=None if budget is None else str(budget),
            seeds=tuple(result.plan.seeds),
            base_general_loss=result.base_general_loss,
            candidates=tuple(
                CandidateSummary.of(candidate, recommendation, folder, result.tasks) for candidate in result.candidates
            ),
            recommendation=None if recommendation is None else RecommendationSummary.of(recommendation, folder),
            evidence=None if recommendation is None else EvidenceSummary.of(recommendation.evidence),
            base_tasks=TaskSummary.all_of("base", result.tasks),
        )

    @classmethod
    def read(cls, folder: ComparisonFolder) -> Self:
        """Read the summary of a comparison from its folder.

        Raises:
            OSError: there is none.
            ValueError: the file is not a summary.
        """
        return cls.model_validate(json.loads(folder.summary.read_text(encoding="utf-8")))

    def write(self, folder: ComparisonFolder) -> None:
        """Write the summary into the folder of the comparison."""
        text = json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"
        # Answers may hold lone surrogates, which UTF-8 cannot encode; backslash escapes are valid JSON.
        write_text(folder.summary, text, errors="backslashreplace")
