"""Plan of a comparison: its options, its budget and the recipe of every run."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftchat.comparing.candidates import (
    Axis,
    Candidate,
    Settings,
    is_of_all,
    make_candidates,
    override_flags,
    slug,
)
from peftchat.comparing.hyperparameter_search import (
    LEARNING_RATE,
    LearningRateGrid,
    Range,
    RateHalving,
    Search,
    TPESearch,
    check_optuna,
)
from peftchat.comparing.measure import measure_of
from peftchat.comparing.objectives import check_objectives, first_objective, written_format
from peftchat.comparing.paired_statistics import NEGLIGIBLE
from peftchat.comparing.short_runs import short_settings, short_share
from peftchat.errors import UserError
from peftchat.paths import escape_path
from peftchat.recipe import load_recipe

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.training.rate_rule import ModelWidth


BudgetKind = Literal["steps", "tokens", "minutes"]
_UNLIMITED_EPOCHS = 1_000_000.0
"""More epochs than any budget reaches."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The length of every run.

    Attributes:
        kind: the unit; minutes of training exclude evaluation.
        amount: how many of it.
    """

    kind: BudgetKind
    amount: float

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe keys that set this length."""
        if self.kind == "steps":
            return {"training.max_steps": int(self.amount)}
        key = "training.max_train_tokens" if self.kind == "tokens" else "training.max_train_minutes"
        amount = int(self.amount) if self.kind == "tokens" else float(self.amount)
        return {"training.max_steps": -1, "training.num_train_epochs": _UNLIMITED_EPOCHS, key: amount}

    def __str__(self) -> str:
        amount = f"{self.amount:g}" if self.kind == "minutes" else f"{int(self.amount):,}"
        return f"{amount} {self.kind}"


def parse_budget(text: str) -> Budget:
    """Parse `steps=200`, `tokens=1e6` or `minutes=30`.

    Raises:
        UserError: the text is anything else.
    """
    kind, _, amount = (part.strip() for part in text.partition("="))
    hint = "Write steps=N, tokens=N or minutes=N."
    if kind not in ("steps", "tokens", "minutes"):
        raise UserError(f"unknown budget `{kind}`", where=f"--budget {text}", hint=hint)
    try:
        number = float(amount.replace("_", ""))
    except ValueError:
        raise UserError(f"`{amount}` is not a number", where=f"--budget {text}", hint=hint) from None
    if not 0 < number < 1e15 or (kind != "minutes" and not number.is_integer()):
        expected = "a number above 0" if kind == "minutes" else "a whole number above 0"
        raise UserError(f"expected {expected}, got {amount}", where=f"--budget {text}", hint=hint)
    return Budget(kind, number)  # type: ignore[arg-type]


_RATES_PER_SIDE = 3
"""Learning rates tried below and above the expected one."""

_MOST_FULL_RATES = 3
"""Learning rates that are all tried in full runs; of more, short runs select."""


def expected_lr(
    candidate: Candidate, loaded: "LoadedRecipe", width: "Callable[[Recipe], ModelWidth] | None" = None
) -> float:
    """Return the learning rate that is likely to suit a candidate.

    It is what `training.learning_rate: auto` gives for it. If the recipe sets a number, that is scaled by the ratio
    between the number and what `auto` gives for the recipe itself.

    Args:
        candidate: the variant and its settings.
        loaded: the recipe that all candidates share.
        width: how to find the width of the base; None to read its config.

    Raises:
        UserError: the candidate's recipe is invalid, or the width of its base cannot be read.
    """
    from peftchat.training.rate_rule import read_width, rule_rate

    width = width or read_width
    flags = [*loaded.overrides, *override_flags(candidate.settings)]
    rule = rule_rate(load_recipe(loaded.path, flags).recipe, width).value
    rate = loaded.recipe.training.learning_rate
    if rate == "auto":
        return rule
    return _round_lr(rate * rule / rule_rate(loaded.recipe, width).value)


def lr_grid(rate: float) -> tuple[float, ...]:
    """Return seven learning rates around `rate` that span a factor of 100, with two digits, in rising order."""
    from peftchat.training.rate_trials import GRID_STEP

    steps = range(-_RATES_PER_SIDE, _RATES_PER_SIDE + 1)
    return tuple(_round_lr(rate * GRID_STEP**step) for step in steps)


def _round_lr(rate: float) -> float:
    return float(f"{rate:.1e}")


_NUM_EVALUATIONS = 6
"""Evaluations during a run if the recipe does not set them."""

_DATA_KEYS = ("data.train", "data.eval", "data.max_train_samples", "data.max_eval_samples")
"""Keys that select the data; the runs read the selected conversations from files."""


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    Attributes:
        recipe: the file that all candidates share.
        variants: names of variants.
        axes: settings; those with several values span a grid of candidates.
        num_seeds: runs of each candidate at its best settings.
        budget: the length of a run; None for the recipe's own.
        learning_rates: learning rates to try; None for a grid around each candidate's expected rate.
        search_lr: whether to try learning rates other than the expected one.
        halving: whether short runs select among more than three learning rates; otherwise all get full runs.
        num_trials: settings that optuna tries for each candidate; 0 for the grid of learning rates.
        ranges: the ranges that optuna searches.
        negligible: fraction of the lowest loss up to which losses count as equal.
    """

    recipe: Path
    variants: Sequence[str]
    axes: Sequence[Axis] = ()
    num_seeds: int = 3
    budget: Budget | None = None
    learning_rates: Sequence[float] | None = None
    search_lr: bool = True
    halving: bool = True
    num_trials: int = 0
    ranges: Sequence[Range] = ()
    negligible: float = NEGLIGIBLE


@dataclass(frozen=True)
class TrainingJob:
    """One training run of a candidate with the settings of a trial and a seed.

    Attributes:
        share: its length as a part of a full run's.
    """

    candidate: Candidate
    settings: Settings
    seed: int
    share: float = 1.0

    @property
    def name(self) -> str:
        """The name of its files."""
        short = f"-short{1 / self.share:g}" if self.share < 1 else ""
        return f"{self.candidate.slug}-{slug(self.settings)}-seed{self.seed}{short}"


@dataclass(frozen=True)
class ComparePlan:
    """A comparison whose recipes have all been checked.

    Attributes:
        options: the user's options.
        base: the recipe that all candidates share, with the budget and the settings that have one value.
        candidates: the candidates to compare.
    """

    options: CompareOptions
    base: "LoadedRecipe"
    candidates: Sequence[Candidate]

    @property
    def seeds(self) -> list[int]:
        """The recipe's seed and the ones after it."""
        first = self.base.recipe.training.seed
        return [first + offset for offset in range(self.options.num_seeds)]

    @property
    def num_runs(self) -> int:
        """The number of training runs if none fails."""
        return sum(self.search(candidate).num_trials + self.options.num_seeds - 1 for candidate in self.candidates)

    @functools.cached_property
    def _width(self) -> "ModelWidth":
        """The width of the base, which all candidates share."""
        from peftchat.training.rate_rule import read_width

        return read_width(self.base.recipe)

    def _expected_lr(self, candidate: Candidate) -> float:
        return expected_lr(candidate, self.base, lambda _: self._width)

    def search(self, candidate: Candidate) -> Search:
        """Start a search over the settings of one candidate."""
        options = self.options
        if options.num_trials:
            searched = {searched.key for searched in options.ranges}
            fixed = {} if LEARNING_RATE in searched else {LEARNING_RATE: self._expected_lr(candidate)}
            return TPESearch(options.num_trials, options.ranges, fixed, self.seeds[0])
        if options.learning_rates is not None:
            return self._rate_search(options.learning_rates)
        rate = self._expected_lr(candidate)
        return self._rate_search(lr_grid(rate) if options.search_lr else [rate])

    def _rate_search(self, rates: Sequence[float]) -> Search:
        if self.options.halving and len(rates) > _MOST_FULL_RATES:
            return RateHalving(rates, short_share(self.base.recipe))
        return LearningRateGrid(rates)

    def run_recipe(self, job: TrainingJob, output_dir: Path, data: Path, chosen: Settings | None = None) -> "Recipe":
        """Return the recipe of one run on the conversations in the folder `data`.

        Args:
            job: the run.
            output_dir: its folder.
            data: both splits.
            chosen: settings that the recipe leaves open, as an earlier run of the candidate has chosen them.
        """
        written = written_format(self.base.recipe)
        files = {
            f"data.{split}": [{"path": escape_path(str(data / f"{split}.jsonl")), "format": written}]
            for split in ("train", "eval")
        }
        requested = {**_shared_settings(self.options), **self._evaluation_settings(job), **job.candidate.settings}
        settings = {key: value for key, value in requested.items() if not key.startswith(_DATA_KEYS)}
        settings |= {"data.max_train_samples": None, "data.max_eval_samples": None, **files}
        settings |= chosen or {}
        settings |= {**job.settings, "training.seed": job.seed, "output_dir": escape_path(str(output_dir))}
        recipe = load_recipe(self.options.recipe, override_flags(settings)).recipe
        if job.share == 1:
            return recipe
        return load_recipe(
            self.options.recipe, override_flags({**settings, **short_settings(recipe, job.share)})
        ).recipe

    def recommended_recipe(self, candidate: Candidate, settings: Settings) -> "Recipe":
        """Return the user's recipe with a candidate's settings.

        Its length and data are the user's own.
        """
        return load_recipe(self.options.recipe, override_flags({**candidate.settings, **settings})).recipe

    def _evaluation_settings(self, job: TrainingJob) -> dict[str, object]:
        """Return settings for a few evaluations during the run.

        If the recipe sets its own, only the one before the first step is added.
        """
        # Other seeds need not measure the loss before training again.
        settings: dict[str, object] = {"training.eval_on_start": job.seed == self.seeds[0]}
        written = self.base.document.value
        if any(written(("training", key)) is not None for key in ("eval_strategy", "eval_steps")):
            return settings
        steps = _known_steps(self.base.recipe)
        if steps is not None:
            settings |= {"training.eval_strategy": "steps", "training.eval_steps": math.ceil(steps / _NUM_EVALUATIONS)}
        elif self.options.budget is not None:
            # On a small dataset, an evaluation per epoch would come every few steps.
            settings["training.eval_strategy"] = "no"
        return settings


def plan_comparison(options: CompareOptions) -> ComparePlan:
    """Check everything that can be checked before the first run.

    Raises:
        UserError: a variant is unknown, there is no held-out data, or the recipe of a candidate is invalid.
    """
    if options.num_trials:
        check_optuna()
    for axis in options.axes:
        if len(axis.values) > 1 and axis.key.startswith(_DATA_KEYS):
            raise UserError(
                f"all candidates must use the same data, got {len(axis.values)} values",
                where=f"--set {axis.key}",
                hint="Give one value, or run one comparison per value.",
            )
    base = load_recipe(options.recipe, override_flags(_shared_settings(options)))
    check_objectives(base, options.axes, options.ranges)
    if not base.recipe.data.has_eval:
        raise UserError(
            f"a comparison needs held-out {measure_of(base.recipe).cases}, and the recipe has none",
            where=base.where("data"),
            hint="Add `--set data.eval_fraction=0.1`, or name files in data.eval.",
        )
    if base.recipe.data.resample:
        raise UserError(
            "a comparison draws the shares of the sources once, so that all candidates have the same data",
            where=base.where("data", "resample"),
            hint="Add `--set data.resample=false`.",
        )
    if base.recipe.evaluation.tasks:
        raise UserError(
            "a comparison asks the tasks of its option, of all runs alike",
            where=base.where("evaluation", "tasks"),
            hint="Add `--set evaluation.tasks=[]`, and name the tasks with `--tasks`.",
        )
    _check_sources(base.recipe)
    plan = ComparePlan(options, base, make_candidates(options.variants, options.axes))
    for candidate in plan.candidates:
        _check_recipe(plan, candidate, {})
    for candidate in plan.candidates:
        _check_candidate(plan, candidate)
    return plan


def _check_candidate(plan: ComparePlan, candidate: Candidate) -> None:
    """Load the recipe of every known trial of a candidate.

    For ranges that optuna searches, both ends are loaded.
    """
    known: list[Settings]
    if plan.options.num_trials:
        ranges = plan.options.ranges
        lowest = {searched.key: int(searched.low) if searched.integer else searched.low for searched in ranges}
        highest = {searched.key: int(searched.high) if searched.integer else searched.high for searched in ranges}
        known = [lowest, highest]
    else:
        known = _tried(plan, candidate)
    for settings in known:
        _check_recipe(plan, candidate, settings)


def _check_recipe(plan: ComparePlan, candidate: Candidate, settings: Settings) -> None:
    try:
        plan.recommended_recipe(candidate, settings)
        for seed in (plan.seeds[0], plan.seeds[-1]):
            plan.run_recipe(TrainingJob(candidate, settings, seed), Path("run"), Path("data"))
    except UserError as error:
        raise UserError(error.message, where=f"{candidate.name}: {error.where}", hint=error.hint) from error


def check_base_fits(plan: ComparePlan) -> None:
    """Check that every candidate can adapt the layers of the base, such as the experts of a mixture.

    The base is built from its config, without weights.

    Raises:
        UserError: some cannot. One message names them all, with the reason of the first.
    """
    from peftchat.models.peft_model import freeze_layers, peft_config
    from peftchat.models.source import ModelSource
    from peftchat.planning.parameter_counts import build_meta_model

    model = build_meta_model(ModelSource.of_recipe(plan.base.recipe).config())
    refused: list[tuple[str, UserError]] = []
    for candidate in plan.candidates:
        recipe = plan.recommended_recipe(candidate, {})
        try:
            if recipe.adapter is None:
                freeze_layers(model, recipe.model.freeze_layers)
            else:
                peft_config(recipe, model)
        except UserError as error:
            refused.append((candidate.name, error))
    if refused:
        name, first = refused[0]
        others = f" Nor can {', '.join(other for other, _ in refused[1:])} be trained on it." if refused[1:] else ""
        hint = f"{first.hint or ''}{others} Leave them out of --variants.".strip()
        raise UserError(first.message, where=f"{name}: {first.where}", hint=hint) from first


def _tried(plan: ComparePlan, candidate: Candidate) -> list[Settings]:
    """Return the settings of every trial of a candidate, whose recipe is loaded for them."""
    try:
        return list(iter(plan.search(candidate).ask, None))
    except UserError as error:
        raise UserError(error.message, where=f"{candidate.name}: {error.where}", hint=error.hint) from error


def _shared_settings(options: CompareOptions) -> dict[str, object]:
    """Return the settings of all candidates: the budget, and keys with one value.

    Adapter keys are left out, since `full` has no adapter, and so are options of one of several objectives.
    """
    shared = {axis.key: axis.values[0] for axis in options.axes if len(axis.values) == 1}
    shared = {key: value for key, value in shared.items() if not key.startswith("adapter.")}
    if several := first_objective(options.axes):
        shared = {key: value for key, value in shared.items() if is_of_all(key)} | several
    return {**shared, **(options.budget.settings if options.budget else {})}


def _check_sources(recipe: "Recipe") -> None:
    from peftchat.conversations.readers import find_files
    from peftchat.models.source import ModelSource

    ModelSource.of_recipe(recipe).check_weights()
    for entry in (*recipe.data.train, *(recipe.data.eval or ())):
        find_files(entry.path, entry.split)


def _known_steps(recipe: "Recipe") -> int | None:
    """Return the optimizer steps of a run; None if they depend on the data."""
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    if training.max_train_tokens is None:
        return None
    examples = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return math.ceil(training.max_train_tokens / (examples * recipe.data.max_length)) if recipe.data.packing else None
