"""Names, grids, budgets, ranges, intervals and the recommendation, without training anything."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat.comparing.candidates import Candidate, format_lr, make_candidates, override_flags, parse_axis, slug
from peftchat.comparing.compare import check_data
from peftchat.comparing.compare_plan import (
    CompareOptions,
    TrainingJob,
    check_base_fits,
    expected_lr,
    lr_grid,
    parse_budget,
    plan_comparison,
)
from peftchat.comparing.hyperparameter_search import (
    LEARNING_RATE,
    LearningRateGrid,
    RateHalving,
    TPESearch,
    parse_range,
)
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult, estimate
from peftchat.comparing.recommend import recommend
from peftchat.comparing.short_runs import short_share
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.recipe.document import parse_yaml
from peftchat.training.rate_rule import ModelWidth
from peftchat.variants import ADAPTERS, get_variant
from tests.support.adapters import make_base
from tests.support.comparing import made, write_rows_and_recipe


@pytest.mark.parametrize(
    ("name", "method", "variant"),
    [
        ("lora", "lora", "lora"),
        ("qlora", "qlora", "lora"),
        ("qlora+dora", "qlora", "dora"),
        ("dora+qlora", "qlora", "dora"),
        ("lora+", "lora", "loraplus"),
        ("qlora+lora+", "qlora", "loraplus"),
        ("loftq", "qlora", "loftq"),
    ],
)
def test_names_mean_a_method_and_a_variant(name: str, method: str, variant: str) -> None:
    (candidate,) = make_candidates([name], [])
    assert (candidate.name, candidate.variant) == (name, variant)
    assert candidate.settings == {"method": method, "adapter.variant": variant}


@pytest.mark.parametrize("name", ["lorra", "qlora+", "+qlora", "qlora+full", "full+dora", "dora+lora", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="unknown variant"):
        make_candidates([name], [])


@pytest.mark.parametrize("other", ["DoRA", "DORA"])
def test_one_variant_by_two_of_its_names_is_no_pair_of_candidates(other: str) -> None:
    with pytest.raises(UserError, match="twice"):
        make_candidates(["dora", other], [])


def test_a_pair_has_one_candidate_in_either_order() -> None:
    with pytest.raises(UserError, match=r"`dora\+qlora` is given twice \(`qlora\+dora` is the same\)"):
        make_candidates(["qlora+dora", "dora+qlora"], [])


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UserError, match="Did you mean `dora`"):
        make_candidates(["dorra"], [])


def test_a_grid_crosses_variants_and_spares_full_the_adapter() -> None:
    axes = [parse_axis("adapter.r=8, 16"), parse_axis("training.weight_decay=0.1")]
    names = [candidate.name for candidate in make_candidates(["lora", "full"], axes)]
    assert names == ["lora r=8", "lora r=16", "full"]
    assert make_candidates(["full"], axes)[0].settings == {"method": "full", "training.weight_decay": 0.1}


def test_commas_inside_brackets_and_quotes_part_no_values() -> None:
    axis = parse_axis("adapter.target_modules=[q_proj, v_proj], all-linear, 'a,b'")
    assert axis.values == (["q_proj", "v_proj"], "all-linear", "a,b")


@pytest.mark.parametrize(
    "flag", ["adapter.r", "=3", "a..b=3", "method=full", "output_dir=x", "training.learning_rate=1e-3,1e-4", "a.b="]
)
def test_settings_that_are_none_are_refused(flag: str) -> None:
    with pytest.raises(UserError):
        parse_axis(flag)


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
settings = st.dictionaries(st.sampled_from(["a.r", "training.learning_rate", "b.names"]), values | st.lists(values))


@given(first=settings, second=settings)
def test_different_settings_have_different_file_names(first: dict[str, Any], second: dict[str, Any]) -> None:
    names = [slug(one) for one in (first, second)]
    assert all(len(name) < 80 and not set(name) & set('/\\ :*?"<>|\n\0') for name in names)
    assert (names[0] == names[1]) <= (first == second)


@given(value=st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(alphabet="abc: ,[]'\"#é"))
def test_flags_read_back_as_what_they_were(value: object) -> None:
    (flag,) = override_flags({"a.b": value})
    assert parse_yaml(flag.partition("=")[2], "test") == value


@given(rate=st.floats(allow_nan=False, allow_infinity=False))
def test_rates_in_few_characters_keep_their_value(rate: float) -> None:
    assert float(format_lr(rate)) == rate


def test_rates_look_as_people_write_them() -> None:
    assert [format_lr(rate) for rate in (2e-4, 6.7e-5, 0.05, 0.1, 3.0)] == ["2e-4", "6.7e-5", "5e-2", "0.1", "3"]


@pytest.mark.parametrize(
    "text", ["steps", "steps=0", "steps=1.5", "hours=3", "minutes=-1", "tokens=many", "minutes=inf"]
)
def test_budgets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_budget(text)


def test_budgets_become_keys_of_the_recipe() -> None:
    assert parse_budget("steps=20").settings == {"training.max_steps": 20}
    tokens, minutes = parse_budget("tokens=2e6").settings, parse_budget("minutes=0.5").settings
    assert tokens["training.max_train_tokens"] == 2_000_000 and tokens["training.max_steps"] == -1
    assert minutes["training.max_train_minutes"] == 0.5


@pytest.mark.parametrize("flag", ["a.b", "a.b=3", "a.b=3..1", "a.b=0..1:log", "a.b=1..2:lin", "a.b=x..y"])
def test_ranges_that_are_none_are_refused(flag: str) -> None:
    with pytest.raises(UserError):
        parse_range(flag)


def _t_mass(limit: float, freedom: int) -> float:
    """Mass of Student's t between -limit and limit, by summing its density."""
    steps = 20_000
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    points = [limit * (number + 0.5) / steps for number in range(steps)]
    return 2 * limit / steps * sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in points)


@pytest.mark.parametrize("count", [2, 3, 4, 10, 31, 32, 60])
def test_the_interval_holds_95_percent_of_students_distribution(count: int) -> None:
    numbers = [float(number) for number in range(count)]
    found = estimate(numbers)
    assert found.margin is not None
    spread = math.sqrt(sum((x - fmean(numbers)) ** 2 for x in numbers) / (count - 1) / count)
    assert _t_mass(found.margin / spread, count - 1) == pytest.approx(0.95, abs=2e-4)


def test_one_value_has_no_interval() -> None:
    assert estimate([2.5]).margin is None


def choice(*outcomes: CandidateResult) -> tuple[str, list[str]]:
    advice = recommend(outcomes, 3.0)
    assert advice is not None
    return advice.recommended.candidate.name, [outcome.candidate.name for outcome in advice.tied]


def test_a_clear_difference_decides_whatever_it_costs() -> None:
    dear = made("dear", [2.00, 2.02, 1.99], seconds=100, memory=1000)
    assert choice(made("cheap", [2.50, 2.51, 2.52]), dear) == ("dear", ["dear"])


def test_within_the_noise_the_cheaper_is_taken() -> None:
    cheap, dear = made("cheap", [2.00, 2.10, 2.05]), made("dear", [2.06, 2.00, 2.04], seconds=20)
    assert choice(cheap, dear) == ("cheap", ["cheap", "dear"])


def test_seeds_are_compared_pair_by_pair() -> None:
    # The seeds differ by far more than the candidates, and yet one is better at each of them.
    better, worse = made("better", [1.0, 2.0, 3.0], seconds=20), made("worse", [1.1, 2.11, 3.09])
    assert choice(better, worse) == ("better", ["better"])


def test_sure_but_negligible_differences_are_ties() -> None:
    lower, cheap = made("lower", [2.000, 2.000, 2.000], seconds=20), made("cheap", [2.001, 2.001, 2.001])
    assert choice(lower, cheap)[0] == "cheap"


def test_costs_that_are_nearly_equal_leave_the_choice_to_the_loss() -> None:
    assert choice(made("a", [2.01], seconds=9.9), made("b", [2.0], seconds=10.0))[0] == "b"


def test_cautions_follow_from_the_numbers() -> None:
    forgetful = made("a", [5.0], tokens=1000)
    forgetful = CandidateResult(
        forgetful.candidate, forgetful.trials, (), Evaluation(general_loss=3.3, merge="differs")
    )
    advice = recommend([forgetful, made("b", [6.0], tokens=2000)], 3.0)
    assert advice is not None
    text = " ".join(advice.warnings)
    for part in ("One seed", "did not fall", "10 %", "1,000 and 2,000 tokens", "other results"):
        assert part in text


def test_nothing_is_recommended_where_all_failed() -> None:
    candidate = Candidate("a", "lora", {})
    assert recommend([CandidateResult(candidate, [RunResult(TrainingJob(candidate, {}, 0), failure="no")])]) is None


def test_the_best_rate_at_an_end_is_told() -> None:
    candidate = Candidate("a", "lora", {})
    tried = [
        RunResult(TrainingJob(candidate, {LEARNING_RATE: rate}, 0), loss=rate, tokens=9, seconds=1.0)
        for rate in (0.1, 0.2, 0.3)
    ]
    assert CandidateResult(candidate, tried).lr_at_grid_end == "lowest"
    assert (
        CandidateResult(
            candidate, [*tried, RunResult(TrainingJob(candidate, {LEARNING_RATE: 0.05}, 0), loss=9.0)]
        ).lr_at_grid_end
        is None
    )


DATA = "data: {train: [{path: rows.jsonl}], eval_fraction: 0.25}\n"


@pytest.mark.parametrize("name", ["lora", "full", "ia3", "qlora"])
def test_each_variant_is_tried_around_its_own_rate(tmp_path: Path, name: str) -> None:
    plain = load_recipe(write_rows_and_recipe(tmp_path, DATA))
    (candidate,) = make_candidates([name], [])

    def width(_: object) -> ModelWidth:
        return ModelWidth("qwen2", 2000)

    # At width 2000 the rule is its constant.
    own = {"lora": 5e-4, "full": 5e-5, "ia3": get_variant("ia3").learning_rate, "qlora": 5e-4}[name]
    assert expected_lr(candidate, plain, width) == own
    # A recipe that trains LoRA at five times the customary rate wants that of every variant.
    times_five = load_recipe(write_rows_and_recipe(tmp_path, f"{DATA}training: {{learning_rate: {5 * 5e-4}}}"))
    assert expected_lr(candidate, times_five, width) == pytest.approx(5 * own, rel=0.05)
    rates = lr_grid(own)
    assert len(rates) == 7 and rates[3] == own and rates[-1] / rates[0] > 30
    assert all(later / earlier == pytest.approx(2.15, rel=0.1) for earlier, later in pairwise(rates))


def test_all_runs_of_a_seed_differ_in_nothing_but_what_is_compared(tmp_path: Path) -> None:
    plan = plan_comparison(
        CompareOptions(
            write_rows_and_recipe(tmp_path, DATA),
            ["lora", "dora", "full"],
            budget=parse_budget("steps=12"),
            learning_rates=[1e-3, 3e-3, 1e-2],
        )
    )
    jobs = [TrainingJob(candidate, {LEARNING_RATE: 1e-3}, 7) for candidate in plan.candidates]
    recipes = [plan.run_recipe(job, tmp_path / job.name, tmp_path / "data") for job in jobs]
    for recipe in recipes:
        assert recipe.data == recipes[0].data and recipe.chat == recipes[0].chat
        assert recipe.training == recipes[0].training
        assert recipe.training.seed == 7 and recipe.training.max_steps == 12
        assert recipe.data.eval_fraction is None and recipe.data.eval is not None
    assert len({recipe.output_dir for recipe in recipes}) == 3
    assert plan.num_runs == 3 * (3 + 2)


@pytest.mark.parametrize(
    ("text", "variants", "axes", "reason"),
    [
        ("data: {train: [{path: rows.jsonl}]}\n", ["lora"], [], "held-out"),
        (DATA, ["ia3"], ["adapter.r=4,8"], "ia3"),
        (DATA, ["qlora+pissa"], [], "4 bits"),
        (DATA, ["lora", "lora"], [], "twice"),
        (DATA, ["lora"], ["adapter.r=4,0"], "adapter.r"),
        (DATA, ["lora"], ["adapter.rank=4"], "rank"),
        (DATA, ["lora"], ["data.eval_fraction=0.1,0.2"], "same data"),
        (DATA, [], [], "no variant"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(
    tmp_path: Path, text: str, variants: list[str], axes: list[str], reason: str
) -> None:
    with pytest.raises(UserError) as refusal:
        plan_comparison(
            CompareOptions(write_rows_and_recipe(tmp_path, text), variants, [parse_axis(axis) for axis in axes])
        )
    assert reason in str(refusal.value)


def test_candidates_that_do_not_fit_the_base_are_one_message(tmp_path: Path) -> None:
    path = write_rows_and_recipe(tmp_path, DATA)
    base = make_base(tmp_path / "base", "qwen3_moe")
    path.write_text(path.read_text().replace("some/model", str(base)))
    check_base_fits(plan_comparison(CompareOptions(path, ["lora", "full"], learning_rates=[1e-4])))
    plan = plan_comparison(CompareOptions(path, ["lora", "dora", "pissa"], learning_rates=[1e-4]))
    with pytest.raises(UserError, match=r"^dora: .*has no DoRA.* Nor can pissa be trained on it"):
        check_base_fits(plan)


def test_rows_may_be_held_out_by_a_flag(tmp_path: Path) -> None:
    path = write_rows_and_recipe(tmp_path, "data: {train: [{path: rows.jsonl}], max_train_samples: 2}\n")
    plan = plan_comparison(
        CompareOptions(path, ["lora", "full"], [parse_axis("data.eval_fraction=0.25")], learning_rates=[1e-3])
    )
    for candidate in plan.candidates:
        recipe = plan.run_recipe(TrainingJob(candidate, {LEARNING_RATE: 1e-3}, 7), tmp_path / "run", tmp_path / "data")
        assert recipe.data.eval_fraction is None and recipe.data.max_train_samples is None
        assert recipe.data.eval is not None and recipe.data.eval[0].path == str(tmp_path / "data" / "eval.jsonl")
        assert plan.recommended_recipe(candidate, {LEARNING_RATE: 1e-3}).data.eval_fraction == 0.25


def test_a_grid_of_rates_is_asked_in_order() -> None:
    search = LearningRateGrid([1e-4, 1e-3])
    assert [settings[LEARNING_RATE] for settings in iter(search.ask, None)] == [1e-4, 1e-3]


def test_every_adapter_of_the_registry_can_be_named() -> None:
    assert [candidate.variant for candidate in make_candidates(ADAPTERS, [])] == list(ADAPTERS)


def test_the_search_finds_a_good_rate_and_repeats_itself() -> None:
    pytest.importorskip("optuna")
    ranges = [parse_range("training.learning_rate=1e-6..1e-1:log"), parse_range("adapter.r=2..64:log")]

    def walk() -> list[tuple[float, dict[str, Any]]]:
        search = TPESearch(25, ranges, {"training.weight_decay": 0.0}, seed=3)
        seen = []
        while (settings := search.ask()) is not None:
            assert 1e-6 <= settings[LEARNING_RATE] <= 1e-1
            assert isinstance(settings["adapter.r"], int) and 2 <= settings["adapter.r"] <= 64
            loss = (math.log10(settings[LEARNING_RATE]) + 3) ** 2
            search.tell(None if len(seen) == 4 else loss)
            seen.append((loss, dict(settings)))
        return seen

    first = walk()
    assert len(first) == 25 and first == walk()
    assert min(loss for loss, _ in first) < 0.1


def walk_halving(loss: Callable[[float], float | None], rates: Sequence[float]) -> list[tuple[float, float]]:
    """The rates that are asked, each with the share of a full run."""
    search = RateHalving(rates)
    asked = []
    while (settings := search.ask()) is not None:
        asked.append((settings[LEARNING_RATE], search.share))
        search.tell(loss(settings[LEARNING_RATE]))
    return asked


def test_short_runs_select_the_best_rate_and_its_better_neighbor() -> None:
    rates = [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]
    asked = walk_halving(lambda rate: abs(math.log(rate / 3.5e-4)), rates)
    assert asked == [*((rate, 1 / 8) for rate in rates), (4e-4, 1.0), (2e-4, 1.0)]
    assert sum(share for _, share in walk_halving(lambda rate: abs(math.log(rate)), lr_grid(1e-3))) <= 3


def test_a_best_rate_at_an_end_widens_the_range_once() -> None:
    rates = [1e-4, 2e-4, 4e-4, 8e-4]
    asked = walk_halving(lambda rate: rate, rates)
    assert asked[4:] == [(5e-5, 1 / 8), (5e-5, 1.0), (1e-4, 1.0)]


def test_rates_that_diverge_are_not_tried_in_full() -> None:
    rates = [1e-4, 2e-4, 4e-4, 8e-4]
    asked = walk_halving(lambda rate: None if rate > 2e-4 else math.nan if rate == 1e-4 else 1.0, rates)
    assert asked[4:] == [(4e-4, 1 / 8), (2e-4, 1.0)]
    assert walk_halving(lambda rate: None, rates) == [(rate, 1 / 8) for rate in rates]


@pytest.mark.parametrize(
    ("training", "short"),
    [
        ("{max_steps: 800, warmup_steps: 80}", {"max_steps": 100, "warmup_steps": 10}),
        ("{max_steps: 20, warmup_steps: 0.1}", {"max_steps": 5, "warmup_steps": 0.1}),
        ("{num_train_epochs: 2, warmup_steps: 8}", {"num_train_epochs": 0.25, "warmup_steps": 1}),
        ("{max_train_tokens: 800}", {"max_train_tokens": 100}),
        (
            "{max_steps: 80, save_steps: 5, eval_steps: 5, load_best_model_at_end: true, early_stopping_patience: 3}",
            {"max_steps": 10, "load_best_model_at_end": False, "early_stopping_patience": None},
        ),
        ("{max_steps: 80, save_strategy: 'no', eval_strategy: 'no'}", {"max_steps": 10}),
        (
            "{max_steps: 80, lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 40}}",
            {"max_steps": 10, "lr_scheduler_kwargs": {"num_decay_steps": 5}},
        ),
    ],
)
def test_a_short_run_has_the_schedule_of_the_full_one(tmp_path: Path, training: str, short: dict[str, Any]) -> None:
    path = write_rows_and_recipe(tmp_path, f"{DATA}training: {training}\n")
    plan = plan_comparison(CompareOptions(path, ["lora"], learning_rates=[1e-4, 2e-4, 4e-4, 8e-4]))
    share = short_share(plan.base.recipe)
    jobs = [TrainingJob(plan.candidates[0], {LEARNING_RATE: 1e-4}, 7, part) for part in (1.0, share)]
    full, shortened = (plan.run_recipe(job, tmp_path / job.name, tmp_path / "data").training for job in jobs)
    assert {key: getattr(shortened, key) for key in short} == short
    unlike = {"eval_on_start", "eval_steps", "eval_strategy", "save_strategy", "save_steps", *short}
    assert {key for key, value in shortened if value != getattr(full, key)} <= unlike
    assert shortened.eval_steps == shortened.save_steps == 10**9 and not shortened.eval_on_start


def test_data_that_no_run_can_use_ends_a_comparison() -> None:
    """The other runs would fail alike, unless the grid encodes the data in several ways."""
    failure = "data.train: 582 of 960 conversations have more tokens than data.max_length: 64. Raise data.max_length."
    with pytest.raises(UserError, match=r"no run can use the data\. data\.train: 582 of 960"):
        check_data(failure, [parse_axis("data.max_length=64")])
    check_data(failure, [parse_axis("data.max_length=64,128")])
    check_data("adapter.r: too large for the layer", [])
    check_data(None, [])
