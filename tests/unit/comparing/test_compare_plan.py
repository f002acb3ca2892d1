"""Budgets, and that all candidates get the same examples."""

from pathlib import Path

import pytest

from peftchat.comparing.candidates import parse_axis
from peftchat.comparing.compare_plan import CompareOptions, TrainingJob, parse_budget, plan_comparison
from peftchat.comparing.hyperparameter_search import RATE
from peftchat.errors import UserError
from tests.support.comparing import DATA, write_records_and_recipe


@pytest.mark.parametrize(
    "text", ["steps", "steps=0", "steps=1.5", "hours=3", "minutes=-1", "tokens=many", "minutes=inf"]
)
def test_budgets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_budget(text)


def test_budgets_become_keys_of_the_recipe() -> None:
    assert parse_budget("steps=20").settings == {"training.max_steps": 20}
    tokens, minutes = parse_budget("tokens=2e6").settings, parse_budget("minutes=0.5").settings
    assert tokens["training.max_tokens"] == 2_000_000 and tokens["training.max_steps"] == -1
    assert minutes["training.max_minutes"] == 0.5


def test_all_runs_of_a_seed_differ_in_nothing_but_what_is_compared(tmp_path: Path) -> None:
    plan = plan_comparison(
        CompareOptions(
            write_records_and_recipe(tmp_path, DATA), ["lora", "dora", "full"], budget=parse_budget("steps=12")
        )
    )
    jobs = [TrainingJob(candidate, {RATE: 1e-3}, 7) for candidate in plan.candidates]
    recipes = [plan.recipe_of(job, tmp_path / job.name, tmp_path / "data") for job in jobs]
    for recipe in recipes:
        assert recipe.data == recipes[0].data and recipe.chat == recipes[0].chat
        assert recipe.training == recipes[0].training
        assert recipe.training.seed == 7 and recipe.training.max_steps == 12
        assert recipe.data.eval_fraction is None and recipe.data.eval is not None
    assert len({recipe.output_dir for recipe in recipes}) == 3
    assert plan.size == 3 * (3 + 2)


@pytest.mark.parametrize(
    ("text", "variants", "axes", "reason"),
    [
        ("data: {train: [{path: records.jsonl}]}\n", ["lora"], [], "held-out"),
        (DATA, ["ia3"], ["adapter.r=4,8"], "ia3"),
        (DATA, ["qlora+pissa"], [], "4 bits"),
        (DATA, ["lora", "lora"], [], "twice"),
        (DATA, ["lora"], ["adapter.r=4,0"], "adapter.r"),
        (DATA, ["lora"], ["adapter.rank=4"], "rank"),
        (DATA, ["lora"], ["data.eval_fraction=0.1,0.2"], "same rows"),
        (DATA, [], [], "no variant"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(
    tmp_path: Path, text: str, variants: list[str], axes: list[str], reason: str
) -> None:
    with pytest.raises(UserError) as refusal:
        plan_comparison(
            CompareOptions(write_records_and_recipe(tmp_path, text), variants, [parse_axis(axis) for axis in axes])
        )
    assert reason in str(refusal.value)


def test_rows_may_be_held_out_by_a_flag(tmp_path: Path) -> None:
    path = write_records_and_recipe(tmp_path, "data: {train: [{path: records.jsonl}], max_train_rows: 2}\n")
    plan = plan_comparison(CompareOptions(path, ["lora", "full"], [parse_axis("data.eval_fraction=0.25")]))
    for candidate in plan.candidates:
        recipe = plan.recipe_of(TrainingJob(candidate, {RATE: 1e-3}, 7), tmp_path / "run", tmp_path / "data")
        assert recipe.data.eval_fraction is None and recipe.data.max_train_rows is None
        assert recipe.data.eval is not None and recipe.data.eval[0].path == str(tmp_path / "data" / "eval.jsonl")
        assert plan.recommended(candidate, {RATE: 1e-3}).data.eval_fraction == 0.25
