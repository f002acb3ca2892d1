"""Search of the learning rate: short runs of one recipe at several rates, from the same weights and on the same data.

A range test (one run whose rate rises) judges a rate by the training loss of single steps, after the weights were moved
by all lower rates. Here every rate gets a run of its own with the recipe's schedule, and held-out conversations decide.
docs/training.md has both compared.
"""

import gc
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from peftchat.dataset.epochs import EpochPacks
from peftchat.errors import UserError, VerificationError
from peftchat.training.build_trainer import build_trainer, sft_config, trainer_of
from peftchat.training.context import RunNotes, TrainContext, TrainOptions, open_context
from peftchat.training.distributed import resolve_distributed
from peftchat.training.model import TrainableModel, load_trainable_model
from peftchat.training.packs import make_packs, optimizer_steps
from peftchat.training.preference_trainer import PreferenceTrainer
from peftchat.training.preflight import preflight
from peftchat.training.progress import MetricsCallback
from peftchat.training.rate_rule import rule_rate
from peftchat.training.rate_trials import GRID_STEP, RateSearch, RateTrial, judge
from peftchat.training.reference import ReferenceLogProbs
from peftchat.training.trainer import ChatTrainer
from peftchat.variants.base import TrainerHooks

if TYPE_CHECKING:
    from peftchat.dataset.collator import BatchLayout
    from peftchat.recipe import LoadedRecipe, Recipe, TrainingSection
    from peftchat.training.distributed import DistributedSetup
    from peftchat.training.held_out import HeldOutCase

DEFAULT_STEPS = 40
"""Optimizer steps of a short run, if the run itself has as many."""

_SIDE = 3
"""Rates below and above the rule's that are always tried."""

_MAX_SIDE = 6
"""Rates on a side of the rule's that are tried at most, while the lowest loss is at the end."""

_EVAL_FRACTION = 0.1
"""Share of the training conversations that is held out where the recipe holds out nothing."""

_MIN_HELD_OUT = 64
"""Held-out sequences that are read after each run at least, if there are as many."""

_STEP_OPTIONS = ("num_decay_steps", "num_stable_steps")
"""Options of schedules that count steps."""


def find_rate(
    loaded: "LoadedRecipe",
    distributed: "DistributedSetup",
    *,
    steps: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> RateSearch:
    """Train short runs at rates around the rule's, and advise one.

    Nothing is written outside a temporary folder.

    Args:
        loaded: the recipe, every other setting chosen; its rate does not count.
        distributed: its `distributed` section, resolved.
        steps: optimizer steps of each run; None for `DEFAULT_STEPS`, or those of the run itself if it has fewer.
        tell: called with one line after each run.

    Raises:
        UserError: the recipe cannot be trained.
        VerificationError: no rate gave a finite loss.
    """
    rule = rule_rate(loaded.recipe)
    with tempfile.TemporaryDirectory(prefix="peftchat-find-lr-") as folder:
        runs = ShortRuns(loaded, distributed, Path(folder) / "run", steps)
        center = round(math.log(rule.value) / math.log(GRID_STEP))
        trials: dict[int, RateTrial] = {}

        def try_at(place: int) -> None:
            trials[place] = trial = runs.train(rule.value * GRID_STEP ** (place - center))
            tell(f"{trial} ({len(trials)} of {max(2 * _SIDE + 1, len(trials))})")

        for place in range(center - _SIDE, center + _SIDE + 1):
            try_at(place)
        while (further := _beyond(trials, center)) is not None:
            try_at(further)
    ordered = [trials[place] for place in sorted(trials)]
    return judge(ordered, rule=rule, steps=runs.steps, run_steps=runs.run_steps, loss_before=runs.loss_before,
                 seed=loaded.recipe.training.seed, cases=cases_of(loaded.recipe))  # fmt: skip


def cases_of(recipe: "Recipe") -> str:
    """Return what a recipe holds out: `conversations`, `pairs` or labeled `answers`."""
    if recipe.has_labels:
        return "answers"
    return "pairs" if recipe.has_pairs else "conversations"


def refuse_processes(loaded: "LoadedRecipe") -> None:
    """Refuse a recipe that is trained by several processes.

    Raises:
        UserError: saying how to search its rate.
    """
    processes, cases = resolve_distributed(loaded).world_size, cases_of(loaded.recipe)
    if processes > 1:
        raise UserError(
            f"the search of a learning rate runs in one process, and the recipe is trained by {processes}",
            where=loaded.where("distributed", "processes"),
            hint="Add `--set distributed.strategy=single --set distributed.processes=1`, and multiply "
            f"training.gradient_accumulation_steps by {processes}, so that a step has as many {cases}.",
        )


def _beyond(trials: dict[int, RateTrial], center: int) -> int | None:
    """Return the next place to try: beyond the end of the rates where the lowest loss is; None if there is none."""
    finite = {place: trial.loss for place, trial in trials.items() if trial.loss is not None}
    if not finite:
        return min(trials) - 1 if center - min(trials) < _MAX_SIDE else None
    best = min(finite, key=finite.__getitem__)
    if best == min(trials) and center - best < _MAX_SIDE:
        return best - 1
    if best == max(trials) and best - center < _MAX_SIDE:
        return best + 1
    return None


class ShortRuns:
    """Short runs of a recipe that begin with the same weights and see the same data in the same order.

    Args:
        loaded: the recipe.
        distributed: its `distributed` section, resolved; one process.
        folder: a folder of no run, for what libraries write.
        steps: optimizer steps of each; None for the default.

    Attributes:
        steps: optimizer steps of each run.
        run_steps: those of the recipe's own run.
        loss_before: held-out loss of the untrained model, once a run was made.
    """

    def __init__(
        self, loaded: "LoadedRecipe", distributed: "DistributedSetup", folder: Path, steps: int | None = None
    ) -> None:
        recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
        if not recipe.data.has_eval:
            recipe = recipe.model_copy(
                update={"data": recipe.data.model_copy(update={"eval_fraction": _EVAL_FRACTION})}
            )
        self._context = open_context(replace(loaded, recipe=recipe), TrainOptions(), distributed)
        sequences = _sequences(self._context)
        self.run_steps = optimizer_steps(recipe.training, sequences, 1)
        self.steps = steps or min(DEFAULT_STEPS, self.run_steps)
        self._start: _Start | None = None
        self.loss_before = math.nan

    def train(self, rate: float, look: Callable[[ChatTrainer], None] | None = None) -> RateTrial:
        """Train a run at a peak rate, and measure its held-out loss.

        Args:
            rate: the peak rate.
            look: called with the trainer, if the run did not fail, before the model's first values are put back.
        """
        context = self._at(rate)
        is_new = self._start is None or self._start.is_stateful
        if is_new:
            self._start = _Start.of(context)
        start = self._start
        assert start is not None
        trainer = start.trainer(context)
        trainer.remove_callback(MetricsCallback)
        trainer.compares_with_reference = False
        _select_held_out(trainer, self.steps)
        if is_new:
            trainer.add_callback(_OnBegin(partial(self._check, trainer, context)))
        held_out: Sequence[HeldOutCase] = ()
        problem = None
        try:
            trainer.train()
            trainer.checks.check_weights(trainer.model, trainer.state.global_step)
            trainer.held_out_metrics()
            held_out = trainer.held_out_cases()
            if look is not None:
                look(trainer)
        except VerificationError as error:
            if math.isnan(self.loss_before):
                raise  # The untrained model has no finite loss.
            problem = str(error).partition(". ")[0].partition(", in ")[0]
        trial = RateTrial(float(f"{rate:.2e}"), tuple(trainer.checks.counts.losses), tuple(held_out), problem)
        start.restore()
        del trainer
        gc.collect()
        return trial

    def _at(self, rate: float) -> TrainContext:
        recipe = self._context.recipe
        training = short_training(recipe.training, rate, self.steps, self.run_steps)
        loaded = replace(self._context.loaded, recipe=recipe.model_copy(update={"training": training}))
        # Notes are the same at every rate.
        notes = self._context.notes if self._start is None else RunNotes(list(self._context.notes.lines), silent=True)
        return replace(self._context, loaded=loaded, notes=notes)

    def _check(self, trainer: ChatTrainer, context: TrainContext) -> None:
        preflight(trainer, context)
        assert self._start is not None
        self._start.note(trainer)
        trainer.prepare()
        self.loss_before = trainer.held_out_metrics()["eval_loss"]


def short_training(training: "TrainingSection", rate: float, steps: int, run_steps: int) -> "TrainingSection":
    """Return the settings of a short run: the schedule of the whole run, in fewer steps, and nothing but steps."""
    warmup = training.warmup_steps
    if warmup >= 1:
        warmup = min(steps, math.ceil(warmup * steps / run_steps))
    options = training.lr_scheduler_kwargs and {
        key: math.ceil(value * steps / run_steps) if key in _STEP_OPTIONS else value
        for key, value in training.lr_scheduler_kwargs.items()
    }
    return training.model_copy(
        update={
            "learning_rate": rate, "max_steps": steps, "warmup_steps": warmup, "lr_scheduler_kwargs": options,
            "max_train_tokens": None, "max_train_minutes": None, "save_strategy": "no", "eval_strategy": "no",
            "eval_on_start": False, "load_best_model_at_end": False, "early_stopping_patience": None,
            "logging_steps": 1, "report_to": (), "on_spike": "log",
        }
    )  # fmt: skip


def _sequences(context: TrainContext) -> int:
    epochs = EpochPacks.of(context.recipe, context.splits["train"])
    return len(make_packs(context, "train", "packed" if context.recipe.data.packing else "padded", epochs))


def _select_held_out(trainer: ChatTrainer, steps: int) -> None:
    """Leave so many held-out sequences, drawn by the seed, that reading them takes less time than training."""
    packs = trainer.eval_dataset
    args = trainer.args
    most = max(_MIN_HELD_OUT, steps * args.per_device_train_batch_size * args.gradient_accumulation_steps // 2)
    if len(packs) > most:
        chosen = np.random.default_rng(args.seed).choice(len(packs), most, replace=False)
        trainer.eval_dataset = packs.select(sorted(chosen.tolist()))


class _OnBegin(TrainerCallback):
    """Calls a function before the first step, with the model as training calls it."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._function()


@dataclass
class _Start:
    """A loaded model, and the values of everything in it that training changes.

    Attributes:
        model: the model.
        is_stateful: whether the variant keeps a state of its own, so that it is loaded again for each run.
        values: copies of the first values.
        forwards: the forward methods of the modules that a trainer wraps, if they have their own.
        layout: the batch layout, once it is known to work.
        reference: the reference's log-probabilities of pairs, once they are computed.
        shares_prompts: whether both answers of a pair go on from one prompt, once it is known to work.
    """

    model: TrainableModel
    is_stateful: bool
    values: dict[str, torch.Tensor]
    forwards: dict[int, Any]
    layout: "BatchLayout | None" = None
    reference: ReferenceLogProbs | None = None
    shares_prompts: bool = False

    @classmethod
    def of(cls, context: TrainContext) -> "_Start":
        """Load the model of a run."""
        model = load_trainable_model(context)
        hooks = TrainerHooks() if context.recipe.adapter is None else context.recipe.adapter.trainer_hooks(model.model)
        is_stateful = type(hooks).on_optimizer_step is not TrainerHooks.on_optimizer_step
        tensors = ((name, one) for name, one in _tensors(model) if one.requires_grad or not _is_parameter(one))
        values = {name: one.detach().to("cpu", copy=True) for name, one in tensors}
        return cls(model, is_stateful, values, {id(one): one.__dict__.get("forward") for one in _wrapped(model)})

    def trainer(self, context: TrainContext) -> ChatTrainer:
        """Return a trainer of the model in its first state."""
        config = sft_config(context)
        if self.layout is None:
            return build_trainer(context, self.model, config)
        trainer = trainer_of(context, self.model, config, self.layout)
        if isinstance(trainer, PreferenceTrainer) and self.reference is not None:
            trainer.reference = self.reference
            trainer.share_prompts(self.shares_prompts)
        return trainer

    def note(self, trainer: ChatTrainer) -> None:
        """Note what the checks before the first step found, for the runs behind the first."""
        self.layout = trainer.layout
        if isinstance(trainer, PreferenceTrainer):
            self.reference, self.shares_prompts = trainer.reference, trainer.shares_prompts

    @torch.no_grad()
    def restore(self) -> None:
        """Put the first values back, and remove what a trainer put around the model's forward."""
        tensors = dict(_tensors(self.model))
        for name, value in self.values.items():
            tensors[name].copy_(value)
            tensors[name].grad = None
        for module in _wrapped(self.model):
            module.__dict__.pop("forward", None)
            noted = self.forwards[id(module)]
            if noted is not None:
                module.__dict__["forward"] = noted


def _tensors(model: TrainableModel) -> list[tuple[str, torch.Tensor]]:
    return [*model.model.named_parameters(), *model.model.named_buffers()]


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _wrapped(model: TrainableModel) -> list[torch.nn.Module]:
    """Return the modules whose forward a trainer wraps."""
    return [model.model, model.causal_model]
