"""Tasks in a comparison: who is set aside by them, who is not, and what is said before the first run."""

import importlib.util
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from peftchat import api
from peftchat.cli.main import cli
from peftchat.comparing.compare_plan import CompareOptions, plan_comparison
from peftchat.comparing.compare_report import print_comparison, write_comparison_files
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.outcomes import CandidateResult
from peftchat.comparing.recommend import Recommendation, recommend
from peftchat.comparing.results import ComparisonResult
from peftchat.comparing.task_evidence import TaskEvidence
from peftchat.comparing.task_scores import TaskScore
from peftchat.errors import UserError
from tests.support.comparing import made, write_rows_and_recipe

QUESTIONS = 200


def score(right: int, *, task: str = "quiz", clusters: int = 0, seed: int = 0, higher: bool = True) -> TaskScore:
    """The first `right` questions are right, but for two that the seed chooses."""
    values = np.arange(QUESTIONS) < right
    flipped = np.random.default_rng(seed).choice(QUESTIONS, 2, replace=False)
    values[flipped] = ~values[flipped]
    groups = tuple(str(number * clusters // QUESTIONS) for number in range(QUESTIONS)) if clusters else ()
    return TaskScore(
        task=task, metric="acc", higher_is_better=higher, shots=0, values=tuple(map(float, values)),
        weights=(1.0,) * QUESTIONS, clusters=groups,
    )  # fmt: skip


def asked(name: str, *rights: int, losses: tuple[float, ...] = (2.0, 2.0, 2.0), **others: object) -> CandidateResult:
    """A candidate with the same score on each task in all its seeds."""
    runs = [
        [
            score(right, task=f"quiz{at}", seed=seed + 10 * len(name), **others)  # type: ignore[arg-type]
            for at, right in enumerate(rights)
        ]
        for seed in range(len(losses))
    ]
    return replace(made(name, list(losses)), task_scores=runs)


def advise(*results: CandidateResult, base: list[TaskScore] | None = None) -> Recommendation:
    advice = recommend(results, 3.0, tasks=TaskEvidence.of(results, base or ()))
    assert advice is not None
    return advice


def test_of_ties_the_one_that_is_certainly_worse_on_a_task_is_set_aside() -> None:
    advice = advise(asked("lora", 80), asked("dora", 120))
    assert advice.recommended.candidate.name == "dora"
    text = " ".join(advice.reasons)
    assert re.search(r"lora is set aside: on quiz0 acc it is worse by 0\.(19|2)\d* ± 0\.[01]\d+ than dora\.", text), (
        text
    )
    assert "over 200 questions of quiz0, and 3 seeds" in text


@pytest.mark.parametrize(
    ("results", "why"),
    [
        ([asked("lora", 100), asked("dora", 104)], "four questions of two hundred are noise"),
        ([asked("lora", 99, losses=(2.0,)), asked("dora", 106, losses=(2.0,))], "of one seed, noise of runs is added"),
        ([asked("lora", 80, clusters=5), asked("dora", 120, clusters=5)], "five texts say little"),
        ([asked("lora", 80, 120), asked("dora", 120, 80)], "two tasks that contradict each other decide nothing"),
        ([asked("lora", 80), made("dora", [2.0] * 3)], "who was not asked is not better"),
    ],
)
def test_what_is_not_certain_sets_nobody_aside(results: list[CandidateResult], why: str) -> None:
    advice = advise(*results)
    assert advice.recommended.candidate.name == "lora", why
    assert "is set aside: on" not in " ".join(advice.reasons)


def test_contradicting_tasks_are_told() -> None:
    text = " ".join(advise(asked("lora", 80, 120), asked("dora", 120, 80)).reasons)
    assert "Tasks contradict each other and set nobody aside. Certainly worse is: lora than dora on quiz0 acc" in text


def test_a_metric_of_which_less_is_better_turns_the_verdict() -> None:
    assert (
        advise(asked("lora", 120, higher=False), asked("dora", 80, higher=False)).recommended.candidate.name == "dora"
    )


def test_a_higher_loss_is_not_outweighed_by_a_task_and_the_trade_is_told() -> None:
    advice = advise(asked("lora", 80), asked("dora", 150, losses=(2.5, 2.5, 2.5)))
    assert advice.recommended.candidate.name == "lora"
    assert re.search(r"Trade-off: dora is better on quiz0 acc by 0\.3[3-6]\d ± ", " ".join(advice.reasons))


def test_worse_than_the_base_is_a_warning_and_so_is_a_failure() -> None:
    failed = replace(made("dora", [2.0] * 3), task_error="no memory")
    advice = advise(asked("lora", 80), failed, base=[score(120, task="quiz0")])
    assert any("On quiz0 acc it is worse than the untouched base, by 0." in text for text in advice.warnings)
    assert any("dora could not be asked the tasks" in text and "no memory" in text for text in advice.warnings)


def test_equal_candidates_are_hardly_ever_set_aside() -> None:
    """Four equal ones, one seed: at most one of twenty comparisons may set somebody aside; fewer questions differ."""
    random, found = np.random.default_rng(0), 0
    for _ in range(25):
        hard = random.normal(0, 1.5, 100)
        values = [(hard + random.normal(0, 0.5, 100) > 0).astype(float) for _ in range(4)]
        results = [
            replace(
                made(name, [2.0]),
                task_scores=[[score(0).model_copy(update={"values": tuple(row), "weights": (1.0,) * 100})]],
            )
            for name, row in zip(("lora", "dora", "vera", "ia3"), values, strict=True)
        ]
        found += bool(TaskEvidence.of(results).set_aside([one.candidate.name for one in results]))
    assert found <= 1


def test_the_mean_of_a_group_weighs_its_tasks_as_it_says() -> None:
    """Ten questions of one task and ninety of another that count alike."""
    values, weights = (1.0,) * 10 + (0.0,) * 90, (1 / 10,) * 10 + (1 / 90,) * 90
    group = score(0).model_copy(update={"values": values, "weights": weights})
    evidence = TaskEvidence.of([replace(made("lora", [2.0]), task_scores=[[group]])])
    assert evidence.tasks[0].means[0] == pytest.approx(0.5)


def test_table_page_and_summary_show_scores_errors_and_gaps(tmp_path: Path) -> None:
    path = write_rows_and_recipe(tmp_path, "data: {train: [{path: rows.jsonl}], eval_fraction: 0.25}\n")
    plan = plan_comparison(CompareOptions(path, ["lora", "dora"], learning_rates=[1e-3]))
    results = [
        replace(one, candidate=candidate)
        for candidate, one in zip(plan.candidates, (asked("lora", 80), asked("dora", 120)), strict=True)
    ]
    result = ComparisonResult.of(plan, results, 3.1, base_tasks=[score(100, task="quiz0")])
    output = io.StringIO()
    print_comparison(result, Console(file=output, width=80))
    shown = output.getvalue()
    assert "quiz0 acc" in shown and "(SE 0.03" in shown and "The base model: quiz0 acc 0." in shown
    folder = ComparisonFolder(tmp_path / "out")
    folder.path.mkdir()
    write_comparison_files(result, folder)
    assert "quiz0 gap" in folder.report.read_text() and "The base model: quiz0 acc" in folder.report.read_text()
    summary = json.loads(folder.summary.read_text())
    of_lora = next(one for one in summary["candidates"] if one["name"] == "lora")["tasks"][0]
    assert of_lora["gap"] == pytest.approx(0.2, abs=0.03) and of_lora["gap_margin"] > 0
    assert of_lora["below_base"] == pytest.approx(0.1, abs=0.02)
    assert summary["base_tasks"][0]["score"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra `evaluate` is installed")
def test_the_missing_harness_is_told_before_the_first_run(tmp_path: Path) -> None:
    path = write_rows_and_recipe(tmp_path, "data: {train: [{path: rows.jsonl}], eval_fraction: 0.25}\n")
    with pytest.raises(UserError, match="EleutherAI's harness, which is not installed"):
        from peftchat.comparing.task_scores import check_tasks

        check_tasks(["arc_easy"])
    assert not (tmp_path / "out").exists() and path.is_file()


def test_a_limit_needs_tasks(tmp_path: Path) -> None:
    path = write_rows_and_recipe(tmp_path, "data: {train: [{path: rows.jsonl}], eval_fraction: 0.25}\n")
    arguments = ["compare", str(path), "--variants", "lora", "--task-limit", "3"]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert isinstance(done.exception, UserError) and "there is no task to limit" in str(done.exception)


def test_tasks_of_the_recipe_are_refused_with_the_option(tmp_path: Path) -> None:
    text = "data: {train: [{path: rows.jsonl}], eval_fraction: 0.25}\nevaluation: {tasks: [arc_easy]}\n"
    path = write_rows_and_recipe(tmp_path, text)
    with pytest.raises(UserError, match="name the tasks with `--tasks`"):
        api.compare(path, ["lora"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
