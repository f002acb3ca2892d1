"""How much each run may use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftchat.comparing.candidates import Axis, Candidate, Settings, flags, make_candidates, slug
from peftchat.comparing.hyperparameter_search import RATE, Range, RateGrid, Search, TreeParzen, check_optuna
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.variants import get_variant

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe


Kind = Literal["steps", "tokens", "minutes"]
_FAR = 1_000_000.0
"""Epochs that no budget reaches."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit that is the same for all runs.

    Attributes:
        kind: what is counted; minutes are of training, without evaluation.
    """

    kind: Kind
    amount: float

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys that bring it about."""
        if self.kind == "steps":
            return {"training.max_steps": int(self.amount)}
        key = "training.max_tokens" if self.kind == "tokens" else "training.max_minutes"
        amount = int(self.amount) if self.kind == "tokens" else float(self.amount)
        return {"training.max_steps": -1, "training.num_train_epochs": _FAR, key: amount}

    def __str__(self) -> str:
        amount = f"{self.amount:g}" if self.kind == "minutes" else f"{int(self.amount):,}"
        return f"{amount} {self.kind}"


def parse_budget(text: str) -> Budget:
    """`steps=200`, `tokens=1e6` or `minutes=30`.

    Raises:
        UserError: anything else.
    """
    kind, _, amount = (part.strip() for part in text.partition("="))
    hint = "Write steps=N, tokens=N or minutes=N."
    if kind not in ("steps", "tokens", "minutes"):
        raise UserError(f"`{kind}` is no budget", where=f"--budget {text}", hint=hint)
    try:
        number = float(amount.replace("_", ""))
    except ValueError:
        raise UserError(f"`{amount}` is not a number", where=f"--budget {text}", hint=hint) from None
    if not 0 < number < 1e15 or (kind != "minutes" and not number.is_integer()):
        what = "must be above 0" if kind == "minutes" else "must be a whole number above 0"
        raise UserError(what, where=f"--budget {text}", hint=hint)
    return Budget(kind, number)  # type: ignore[arg-type]


LR_FACTORS = (1 / 3, 1.0, 3.0)
"""Factors around the rate that is expected to suit."""


def expected_lr(candidate: Candidate, loaded: "LoadedRecipe") -> float:
    """The rate that is likely to suit a candidate.

    It is the customary one of its variant. A recipe that gives a rate of its own knows something about its model and
    data, so the customary rate is then scaled by as much as the recipe's departs from its own variant's.

    Args:
        loaded: the recipe that all candidates start from.
    """
    recipe = loaded.recipe
    hint = get_variant(candidate.variant).learning_rate
    if loaded.document.value(("training", "learning_rate")) is None:
        return hint
    own = "full" if recipe.adapter is None else recipe.adapter.variant
    return _round_lr(recipe.training.learning_rate * hint / get_variant(own).learning_rate)


def lr_grid(rate: float) -> tuple[float, ...]:
    """Three rates around `rate`, to two digits, rising."""
    return tuple(_round_lr(rate * factor) for factor in LR_FACTORS)


def _round_lr(rate: float) -> float:
    return float(f"{rate:.1e}")


_EVALUATIONS = 6
"""Points of a held-out curve after the first, where the recipe leaves the choice."""

_DATA_KEYS = ("data.train", "data.eval", "data.max_train_rows", "data.max_eval_rows")
"""Keys that say which rows there are; the runs get these rows as files."""


@dataclass(frozen=True)
class CompareOptions:
    """What the user asked for.

    Attributes:
        recipe: the file that all candidates start from.
        variants: their names.
        axes: settings; those of several values span the grid.
        seeds: how many runs of each candidate at its best settings.
        budget: None for the recipe's own length.
        rates: learning rates to try; None for a grid of each candidate's own.
        fixed_rate: try no rate but the expected one.
        trials: settings to try for each candidate by optuna; 0 for none.
        ranges: what optuna looks through.
    """

    recipe: Path
    variants: Sequence[str]
    axes: Sequence[Axis] = ()
    seeds: int = 3
    budget: Budget | None = None
    rates: Sequence[float] | None = None
    fixed_rate: bool = False
    trials: int = 0
    ranges: Sequence[Range] = ()


@dataclass(frozen=True)
class TrainingJob:
    """One training run: a candidate, settings to try it with, and a seed."""

    candidate: Candidate
    settings: Settings
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.candidate.slug}-{slug(self.settings)}-seed{self.seed}"


@dataclass(frozen=True)
class ComparePlan:
    """A comparison whose every part has been checked.

    Attributes:
        base: the recipe that all candidates start from, with the budget and the settings of one value.
        candidates: what is compared.
        wish: what was asked for.
    """

    wish: CompareOptions
    base: "LoadedRecipe"
    candidates: Sequence[Candidate]

    @property
    def seeds(self) -> list[int]:
        """The recipe's own seed and those after it."""
        first = self.base.recipe.training.seed
        return [first + number for number in range(self.wish.seeds)]

    @property
    def size(self) -> int:
        """Training runs if none fails."""
        return sum(self.search(candidate).size + self.wish.seeds - 1 for candidate in self.candidates)

    def search(self, candidate: Candidate) -> Search:
        """A fresh search through the settings of one candidate."""
        wish = self.wish
        if wish.trials:
            named = {span.key for span in wish.ranges}
            fixed = {} if RATE in named else {RATE: expected_lr(candidate, self.base)}
            return TreeParzen(wish.trials, wish.ranges, fixed, self.seeds[0])
        if wish.rates is not None:
            return RateGrid(wish.rates)
        rate = expected_lr(candidate, self.base)
        return RateGrid([rate] if wish.fixed_rate else lr_grid(rate))

    def recipe_of(self, job: TrainingJob, output_dir: Path, data: Path) -> "Recipe":
        """The recipe of one run, on the rows in the folder `data`."""
        rows = {
            "data.train": [{"path": str(data / "train.jsonl"), "format": "messages"}],
            "data.eval": [{"path": str(data / "eval.jsonl"), "format": "messages"}],
        }
        asked = {**_common(self.wish), **self._evaluation(), **job.candidate.settings}
        settings = {key: value for key, value in asked.items() if not key.startswith(_DATA_KEYS)}
        settings |= {"data.max_train_rows": None, "data.max_eval_rows": None, **rows}
        settings |= {**job.settings, "training.seed": job.seed, "output_dir": str(output_dir)}
        return load_recipe(self.wish.recipe, flags(settings)).recipe

    def recommended(self, candidate: Candidate, settings: Settings) -> "Recipe":
        """The user's recipe with a candidate's settings, at the recipe's own length and on its own data."""
        return load_recipe(self.wish.recipe, flags({**candidate.settings, **settings})).recipe

    def _evaluation(self) -> dict[str, object]:
        """Evaluate a few times on the way, where the recipe does not say when."""
        settings: dict[str, object] = {"training.eval_on_start": True}
        written = self.base.document.value
        if any(written(("training", key)) is not None for key in ("eval_strategy", "eval_steps")):
            return settings
        steps = _steps(self.base.recipe)
        if steps is not None:
            settings |= {"training.eval_strategy": "steps", "training.eval_steps": math.ceil(steps / _EVALUATIONS)}
        elif self.wish.budget is not None:
            # After every epoch would be after every few steps of a small set, and there are no other marks.
            settings["training.eval_strategy"] = "no"
        return settings


def plan_comparison(wish: CompareOptions) -> ComparePlan:
    """Check everything that can be checked before the first run.

    Raises:
        UserError: an unknown variant, no held-out data, or a candidate that no recipe can describe.
    """
    if wish.trials:
        check_optuna()
    for axis in wish.axes:
        if len(axis.values) > 1 and axis.key.startswith(_DATA_KEYS):
            what = "all runs are trained on the same rows and judged by the same"
            raise UserError(what, where=f"--set {axis.key}", hint="Give one value, or compare recipes of their own.")
    base = load_recipe(wish.recipe, flags(_common(wish)))
    if not base.recipe.data.has_eval:
        raise UserError(
            "a comparison judges by held-out conversations, and the recipe has none",
            where=base.where("data"),
            hint="Add `--set data.eval_fraction=0.1`, or name files in data.eval.",
        )
    _check_sources(base.recipe)
    plan = ComparePlan(wish, base, make_candidates(wish.variants, wish.axes))
    for candidate in plan.candidates:
        _check(plan, candidate)
    return plan


def _check(plan: ComparePlan, candidate: Candidate) -> None:
    """Read the recipe of every settings that can be known, or of both ends of what is searched."""
    known: list[Settings]
    if plan.wish.trials:
        lowest = {span.key: int(span.low) if span.whole else span.low for span in plan.wish.ranges}
        highest = {span.key: int(span.high) if span.whole else span.high for span in plan.wish.ranges}
        known = [lowest, highest]
    else:
        search = plan.search(candidate)
        known = list(iter(search.ask, None))
    for settings in known:
        try:
            plan.recommended(candidate, settings)
            plan.recipe_of(TrainingJob(candidate, settings, plan.seeds[0]), Path("run"), Path("data"))
        except UserError as error:
            raise UserError(error.what, where=f"{candidate.name}: {error.where}", hint=error.hint) from error


def _common(wish: CompareOptions) -> dict[str, object]:
    """What all candidates share: the budget, and settings of one value that no candidate leaves out."""
    shared = {axis.key: axis.values[0] for axis in wish.axes if len(axis.values) == 1}
    shared = {key: value for key, value in shared.items() if not key.startswith("adapter.")}
    return {**shared, **(wish.budget.settings if wish.budget else {})}


def _check_sources(recipe: "Recipe") -> None:
    from peftchat.conversations.readers import find_files
    from peftchat.models.source import ModelSource

    ModelSource.of_recipe(recipe).check_weights()
    for entry in (*recipe.data.train, *(recipe.data.eval or ())):
        find_files(entry.path, entry.split)


def _steps(recipe: "Recipe") -> int | None:
    """Optimizer steps of a run, where they can be told without reading the data."""
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    if training.max_tokens is None:
        return None
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return math.ceil(training.max_tokens / (rows * recipe.data.max_length)) if recipe.data.packing else None
