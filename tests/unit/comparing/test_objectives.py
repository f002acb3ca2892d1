"""Objectives as candidates: judged by the pairs that are right, never by losses of different units."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peftchat.comparing.candidates import Axis, Candidate, make_candidates
from peftchat.comparing.compare_plan import CompareOptions, TrainingJob, plan_comparison
from peftchat.comparing.evidence import Evidence
from peftchat.comparing.hyperparameter_search import LEARNING_RATE, parse_range
from peftchat.comparing.measure import PAIRS
from peftchat.comparing.outcomes import CandidateResult, RunResult, read_run_result
from peftchat.comparing.pair_scores import with_scores
from peftchat.comparing.paired_statistics import least_errors
from peftchat.comparing.recommend import recommend
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.runs.eval_pairs import PairResult
from peftchat.training.train import train
from tests.support.comparing import write_rows_and_recipe
from tests.support.models import small_model
from tests.support.pairs import pair_recipe, write_pairs

PAIRS_HELD_OUT = 60


def made(name: str, loss: float, right: int, *, seeds: int = 3, before: bool = True) -> CandidateResult:
    """A candidate with so many of 60 held-out pairs right, each by a margin of 2 nats against the start."""
    candidate = Candidate(name, "lora", {"objective": name})
    pairs = [
        PairResult(
            -1, f"eval.jsonl:{row}", 5, 5, -10.0 + (1 if row < right else -1), -9.0 - (1 if row < right else -1),
            # The objective's own rewards say the opposite.
            0.0 if row < right else 1.0, 1.0 if row < right else 0.0, loss,
            **({"chosen_logp_before": -10.0, "rejected_logp_before": -9.0} if before else {}),
        )
        for row in range(PAIRS_HELD_OUT)
    ]  # fmt: skip
    runs = [
        RunResult(TrainingJob(candidate, {LEARNING_RATE: 1e-5}, seed), loss=loss, steps=4, tokens=100, seconds=1.0,
                  peak_memory_bytes=100, pairs=pairs)
        for seed in range(seeds)
    ]  # fmt: skip
    return CandidateResult(candidate, runs[:1], runs[1:])


def test_the_most_right_pairs_win_whatever_the_losses_are() -> None:
    dpo, simpo = with_scores([made("dpo", 0.69, 57), made("simpo", 0.01, 20, before=False)])
    advice = recommend([dpo, simpo], measure=PAIRS)
    assert advice is not None and advice.recommended is dpo and advice.tied == [dpo]
    assert advice.reasons[0] == "Of the held-out pairs, 95 % are right, with a mean margin of +1.800 nats."
    assert any("Behind by more than the noise: simpo (-61.7 ± " in one for one in advice.reasons)
    # Both are held against the start of `dpo`, the only one that measured it.
    assert simpo.right is not None and simpo.right.mean == pytest.approx(20 / 60)
    assert not any("held-out loss" in one for one in (*advice.reasons, *advice.warnings))


def test_without_a_start_the_own_rewards_count() -> None:
    (alone,) = with_scores([made("simpo", 0.1, 45, before=False)])
    assert alone.right is not None and alone.right.mean == pytest.approx(15 / 60)
    assert alone.margin is None


def test_one_pair_of_difference_is_a_tie_and_perfect_candidates_have_an_interval() -> None:
    results = with_scores([made("dpo", 0.2, 60), made("simpo", 0.3, 59), made("cpo", 0.4, 60)])
    evidence = Evidence.of(results, measure=PAIRS)
    assert evidence is not None and len(evidence.tied) == 3
    gap = evidence.gap(results[0], results[2])
    assert gap is not None and gap.mean == 0
    # Bonett and Price: one more pair on either side of 62.
    assert gap.margin_together is not None and gap.margin_together >= 1.96 * (2 / 62 / 62) ** 0.5
    assert evidence.threshold == 0.005


def test_an_objectives_options_are_no_candidates_of_another() -> None:
    axes = [Axis("objective", ("dpo", "simpo")), Axis("dpo.beta", (0.1, 0.5)), Axis("simpo.gamma", (0.5,))]
    candidates = make_candidates(["lora"], axes)
    assert [one.name for one in candidates] == ["lora dpo beta=0.1", "lora dpo beta=0.5", "lora simpo"]
    assert "simpo.gamma" not in candidates[0].settings and candidates[2].settings["simpo.gamma"] == 0.5


@pytest.mark.parametrize(
    ("axes", "ranges", "said"),
    [
        ([Axis("objective", ("dpo", "kto"))], [], "`kto` learns from labeled answers"),
        ([Axis("objective", ("sft", "dpo"))], [], "`sft` learns from conversations"),
        ([], ["dpo.beta=0.01..0.5"], "this key changes what the loss is"),
        ([Axis("data.eval_fraction", (None,))], [], "a comparison needs held-out pairs"),
    ],
)
def test_what_no_measure_can_judge_is_refused(tmp_path: Path, axes: list[Axis], ranges: list[str], said: str) -> None:
    recipe = write_rows_and_recipe(
        tmp_path, "objective: dpo\ndata: {train: [{path: rows.jsonl}], eval_fraction: 0.5}\n"
    )
    options = CompareOptions(recipe, ["lora"], axes=axes, ranges=[parse_range(one) for one in ranges])
    with pytest.raises(UserError) as refused:
        plan_comparison(options)
    assert said in str(refused.value)


def test_the_options_of_the_recipes_objective_do_not_hinder_another(tmp_path: Path) -> None:
    recipe = write_rows_and_recipe(tmp_path, "objective: dpo\ndpo: {beta: 0.3}\ndata: {train: [{path: rows.jsonl}]}\n")
    assert load_recipe(recipe).recipe.dpo is not None
    other = load_recipe(recipe, ["objective=simpo", "simpo.gamma=0.2"]).recipe
    assert other.dpo is None and other.simpo is not None and other.simpo.gamma == 0.2


def test_scores_of_a_dpo_run_are_its_own_rewards(tmp_path: Path) -> None:
    files = write_pairs(tmp_path / "train.jsonl", 8), write_pairs(tmp_path / "eval.jsonl", 7, 3)
    settings = {"max_steps": 4, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    loaded = load_recipe(pair_recipe(tmp_path, small_model(), *files, training=settings))
    summary = train(loaded)
    candidate = Candidate("lora", "lora", {})
    run = read_run_result(TrainingJob(candidate, {}, 0), tmp_path / "run")
    (scored,) = with_scores([CandidateResult(candidate, [run])])
    assert summary.eval_pairs is not None and scored.right is not None and run.own_right == summary.eval_pairs.right
    assert scored.right.mean == summary.eval_pairs.right
    beta = loaded.recipe.dpo.beta if loaded.recipe.dpo is not None else 0.0
    assert scored.margin == pytest.approx(summary.eval_pairs.margin / beta, abs=1e-3)
    assert [place for place, _ in run.own_curve] == [0, 2, 4]
    assert replace(run, pairs=()).right is None


def test_the_least_error_of_shares_is_that_of_the_paper_and_goes_by_how_much_cases_differ() -> None:
    ours, theirs = np.zeros(60), np.zeros(60)
    ours[:9], theirs[9:13] = 1, 1
    apart = np.arange(60)
    more, less = 10 / 62, 5 / 62
    paper = ((more + less - (more - less) ** 2) / 62) ** 0.5
    assert least_errors(np.stack([ours, theirs]), apart)[0, 1] == pytest.approx(paper)
    # A case that one seed of three has right is no case that all have right.
    thirds = least_errors(np.stack([ours / 3, theirs / 3]), apart)[0, 1]
    assert thirds == pytest.approx((((13 / 9 + 2) / 62 - (5 / 3 / 62) ** 2) / 62) ** 0.5)
    # Two copies of each case in a cluster say what one says; a cluster of which a part differs counts by that part.
    twice = np.repeat(np.stack([ours, theirs]), 2, axis=1)
    assert least_errors(twice, np.repeat(apart, 2))[0, 1] == pytest.approx(paper)
    half = twice * np.tile([1.0, 0.0], 60)
    assert least_errors(half, np.repeat(apart, 2))[0, 1] < paper
