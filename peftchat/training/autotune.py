"""Autotuning: the fastest way to compute this run's steps on this machine, measured on real batches before the first.

Only long runs measure, for at most a hundredth of their time; what they found serves later runs of the same kind.
Weights, optimizer, random numbers and the order of the data are afterwards what they were.
"""

import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import nn

from peftchat.formatting import format_duration
from peftchat.models.compiled import compile_layers, switch_compiled
from peftchat.models.fused_lora import has_fused_layers, switch_fused
from peftchat.models.loading import VARLEN
from peftchat.runs.run_summary import AutoSetting
from peftchat.training.choice_names import choice_name, chosen_setting, measured_settings
from peftchat.training.compiling import MIN_LONG_SECONDS, has_matrix_tiles, least_training_seconds, may_compile
from peftchat.training.kept_choices import (
    Choice,
    Measurement,
    circumstances,
    keep,
    physical_cores,
    read_choice,
    read_kept,
)
from peftchat.training.model import TrainableModel
from peftchat.training.packs import optimizer_steps
from peftchat.training.progress import memory_in_use

if TYPE_CHECKING:
    from peftchat.dataset.collator import BatchLayout
    from peftchat.training.context import TrainContext
    from peftchat.training.trainer import ChatTrainer

_BUDGET = 0.01
"""Fraction of the planned time that a measurement may take."""

_ROUNDS = 3
"""Measured passes of each way. All ways take turns, so that other work on the machine disturbs them alike."""

_GAIN = 0.97
"""A way is chosen if it takes at most this fraction of the default's time, and was slower in no round."""

_HOPELESS = 1.3
"""A way that takes this much longer in its first round is not tried again."""

_LOSS_TOLERANCE = 0.02
"""By how much the loss of a way may differ, in nats per target: rounding, and dropout drawn in another order."""

_COMPILE_SECONDS = 25.0
"""What the compiler takes at first."""


def choose_fastest(trainer: "ChatTrainer", context: "TrainContext", model: TrainableModel) -> tuple[AutoSetting, ...]:
    """Choose how to compute the steps, by what the run began with, by a kept measurement or by a new one.

    Every process calls it, and all take what the first one decides.

    Returns:
        What was chosen or refused, with the figures.
    """
    tuner = _Tuner(trainer, context, model)
    started = read_choice(context.run_folder.choices) if context.options.resume else None
    started = trainer.gather_objects(started)[0]
    if started is not None:
        wanted = tuner.possible(started)
        tuner.adopt(wanted)
        return tuple(chosen_setting(name, value, "as the run was started")
                     for name, value in tuner.default.differences(wanted).items())  # fmt: skip
    # How much memory is left may differ between processes.
    candidates = trainer.gather_objects(tuner.candidates() if tuner.is_open else ())[0]
    measured = tuner.measured(candidates) if candidates else None
    if measured is not None:
        tuner.adopt(tuner.possible(measured.chosen))
        return measured_settings(measured)
    if tuner.may_compile and tuner.least_seconds >= MIN_LONG_SECONDS and has_matrix_tiles():
        tuner.adopt(replace(tuner.default, compiled=True))
        least = format_duration(tuner.least_seconds)
        return (
            chosen_setting("compiled", True, f"the steps take at least {least}, and this CPU has AMX; not measured"),
        )
    return ()


def present_choice(trainer: "ChatTrainer") -> Choice:
    """Return how a trainer computes its steps."""
    attention = str(trainer.causal_model.config._attn_implementation)
    settings = trainer.loss_settings
    return Choice(
        settings.compiled, attention, torch.get_num_threads(), settings.chunk_factor,
        micro_batch=trainer.args.train_batch_size, fused_adapter=has_fused_layers(trainer.model),
    )  # fmt: skip


@contextmanager
def threads_restored() -> Iterator[None]:
    """Give this process back its number of threads at the end of the block."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


class _Tuner:
    """Applies ways to compute the steps to a trainer, and measures them.

    Attributes:
        default: what the run takes without measuring.
        may_compile: whether layers may be compiled without being asked.
        is_open: whether anything may be chosen at all.
        least_seconds: training time on fast cores.
    """

    def __init__(self, trainer: "ChatTrainer", context: "TrainContext", model: TrainableModel) -> None:
        self._trainer, self._context = trainer, context
        recipe, distributed = context.recipe, context.distributed
        self.default = present_choice(trainer)
        self.may_compile = model.compilable and not recipe.has_pairs and may_compile(recipe, distributed)
        # The loss of a pair is of another kind, and DeepSpeed gathers weights in every pass.
        self.is_open = not (distributed.gpus or distributed.uses_deepspeed or recipe.has_pairs)
        self.is_open = self.is_open and recipe.training.autotune is not False
        self.least_seconds = least_training_seconds(
            recipe, distributed, trainer.causal_model, context.splits["train"].stats
        )
        self._layout: BatchLayout = trainer.layout
        self._compile_seconds = 0.0
        # Packs of a measured pass: as many as the largest micro-batch, so that all ways compute the same ones.
        self._packs = self.default.micro_batch

    def candidates(self) -> tuple[Choice, ...]:
        """Return the other ways, each with one difference from the default, those that gain most first."""
        recipe, default = self._context.recipe, self.default
        found = [replace(default, compiled=True)] if self.may_compile and not default.compiled else []
        # Rows of another shape draw other random numbers, so with dropout the losses would be others.
        is_open = recipe.model.attention == "auto" and recipe.data.packing and not self._is_random
        if is_open and default.attention == VARLEN:
            found += [replace(default, attention=name) for name in ("sdpa", "eager")
                      if name != "eager" or self._eager_fits()]  # fmt: skip
        if not self._context.threads_given:
            fewer = {physical_cores(), default.threads // 2} if default.threads > 1 else set()
            found += [replace(default, threads=n) for n in sorted(fewer, reverse=True) if 0 < n < default.threads]
        found += [replace(default, micro_batch=size) for size in self._micro_batches() if self._fits(size)]
        found += [replace(default, fused_adapter=False)] if default.fused_adapter else []
        return (*found, *(replace(default, loss_chunk=factor) for factor in (0.5, 2.0)))

    @property
    def _is_random(self) -> bool:
        return any(isinstance(one, nn.Dropout) and one.p > 0 for one in self._trainer.model.modules())

    def _micro_batches(self) -> list[int]:
        """Return the other micro-batches that the recipe leaves open: twice and half as many packs at a time."""
        training, trainer, size = self._context.recipe.training, self._trainer, self.default.micro_batch
        written = self._context.loaded.document.value(("training", "per_device_train_batch_size"))
        # The loss that balances experts is another for each cut of a step, and a weight that is updated in the backward
        # pass has one pass a step.
        is_open = written is None and not trainer.aux_loss_enabled and not trainer.frees_gradients
        if not is_open or self._is_random:
            return []
        doubled = [2 * size] if training.gradient_accumulation_steps % 2 == 0 else []
        return doubled + ([size // 2] if size % 2 == 0 else [])

    def _eager_fits(self) -> bool:
        """Return whether attention weights over whole packs, kept for a backward pass, fit into half the memory."""
        config, length = self._trainer.causal_model.config.get_text_config(), self._context.recipe.data.max_length
        # The scores, the weights, and the weights in the dtype of the values: of all layers, or of one recomputed.
        layers = 1 if self._trainer.args.gradient_checkpointing else config.num_hidden_layers
        kept = 3 * 4 * layers * config.num_attention_heads * 2 * self.default.micro_batch * length**2
        return bool(kept < psutil.virtual_memory().available / 2)

    def _fits(self, micro_batch: int) -> bool:
        """Return whether memory is left for a micro-batch; one twice as large at most doubles what is held."""
        return micro_batch < self.default.micro_batch or psutil.virtual_memory().available > 2 * memory_in_use()

    def possible(self, wanted: Choice) -> Choice:
        """Return a choice of another machine without what this one, or the recipe as it is now, does not allow."""
        recipe, default = self._context.recipe, self.default
        values = default.differences(wanted)
        if wanted.compiled and not self.may_compile:
            values.pop("compiled", None)
        if recipe.model.attention != "auto" or not recipe.data.packing:
            values.pop("attention", None)
        if wanted.attention == "eager" and not self._eager_fits():
            values.pop("attention", None)
        if self._context.threads_given or wanted.threads > default.threads:
            values.pop("threads", None)
        if wanted.micro_batch not in self._micro_batches():
            values.pop("micro_batch", None)
        if not default.fused_adapter:
            values.pop("fused_adapter", None)
        return default.with_values(values)

    def adopt(self, choice: Choice) -> None:
        """Compute all steps of the run this way."""
        self._apply(choice)
        self._trainer.set_micro_batch(choice.micro_batch)

    def _apply(self, choice: Choice) -> None:
        """Compute all later passes this way, whatever their micro-batch."""
        trainer, model = self._trainer, self._trainer.causal_model
        if choice.compiled:
            compile_layers(model)
        else:
            switch_compiled(model, on=False)
        switch_fused(trainer.model, on=choice.fused_adapter)
        trainer.loss_settings.compiled = choice.compiled
        trainer.loss_settings.chunk_factor = choice.loss_chunk
        if choice.attention != model.config._attn_implementation:
            model.set_attn_implementation(choice.attention)
        trainer.set_layout(self._layout if choice.attention == self.default.attention else "packed")
        if choice.threads != torch.get_num_threads():
            torch.set_num_threads(choice.threads)

    def measured(self, candidates: Sequence[Choice]) -> Measurement | None:
        """Return the kept measurement of these circumstances, or a new one; None where the run is too short for it."""
        trainer, context = self._trainer, self._context
        key = circumstances(context, trainer, self.default)
        known = trainer.gather_objects(read_kept(key))[0]
        asked = context.recipe.training.autotune is True
        if known is not None and not self._can_try_more(known, candidates, asked=asked):
            return self._worth_its_wait(known)
        if not asked and self.least_seconds < MIN_LONG_SECONDS:
            return None
        context.position.enter("measuring what is fastest here", 0)
        with self._left_as_it_was():
            found = self._measure(candidates, asked=asked)
        if found is not None and context.is_main and not keep(key, found):
            context.notes.tell("The measurement of what is fastest here could not be kept for later runs.")
        return found

    def _can_try_more(self, known: Measurement, candidates: Sequence[Choice], *, asked: bool) -> bool:
        """Return whether a shorter run left ways untried, and this one has the time for all of them."""
        if all(choice_name(self.default, way) in known.ratios for way in candidates):
            return False
        limit = float("inf") if asked else _BUDGET * self._planned_seconds(known.seconds)
        return len(self._affordable(candidates, known.seconds, limit)) == len(candidates)

    def _planned_seconds(self, pass_seconds: float) -> float:
        recipe, distributed = self._context.recipe, self._context.distributed
        training = recipe.training
        steps = optimizer_steps(training, len(self._trainer.train_dataset), distributed.world_size)
        seconds = steps * training.gradient_accumulation_steps * pass_seconds
        limit = training.max_train_minutes
        return seconds if limit is None else min(seconds, 60 * limit)

    def _worth_its_wait(self, known: Measurement) -> Measurement:
        """Return a kept measurement, without the compiler if the run is too short to repay its wait."""
        if not known.chosen.compiled or self.default.compiled:
            return known
        gain = 1 - known.ratios.get("compiled=True", 1.0)
        if gain * self._planned_seconds(known.seconds) > known.compile_seconds:
            return known
        return replace(known, chosen=replace(known.chosen, compiled=False))

    def _measure(self, candidates: Sequence[Choice], *, asked: bool) -> Measurement | None:
        began = time.perf_counter()
        gathered = self._trainer.gather_objects
        self._packs = max(way.micro_batch for way in (self.default, *candidates))
        self._time(self.default, 0)
        seconds, loss = self._time(self.default, 0)
        limit = float("inf") if asked else _BUDGET * self._planned_seconds(seconds)
        ways = gathered(self._affordable(candidates, seconds, limit))[0]
        if not ways:
            return None
        ratios, slowest, differs = self._ratios(self.default, ways, loss)
        named = {way: choice_name(self.default, way) for way in ways}
        faster = [way for way, name in named.items() if ratios[name] <= _GAIN and slowest[name] <= 1.0]
        winners = gathered([way for way in faster if named[way] not in differs])[0]
        chosen = self._together(winners, {way: ratios[choice_name(self.default, way)] for way in winners}, loss)
        return Measurement(
            self.default, gathered(chosen)[0], seconds, ratios, differs, round(self._compile_seconds, 2),
            round(time.perf_counter() - began, 2), datetime.now(UTC).date().isoformat(),
        )  # fmt: skip

    def _affordable(self, candidates: Sequence[Choice], seconds: float, limit: float) -> list[Choice]:
        """Return the ways that can be measured within a time, the first ones first."""
        # The default is measured beside them, and has been twice already.
        seconds *= self._packs / self.default.micro_batch
        cost, ways = (_ROUNDS + 2) * seconds, []
        for way in candidates:
            own = (_ROUNDS + 1) * seconds + (_COMPILE_SECONDS if way.compiled and not self.default.compiled else 0.0)
            if cost + own <= limit:
                cost += own
                ways.append(way)
        return ways

    def _ratios(
        self, base: Choice, ways: Sequence[Choice], loss: float
    ) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
        """Measure ways beside another one, in turns.

        Returns:
            The median ratio of each to the other one's time, the largest, and the names of those with another loss.
        """
        times: dict[str, list[float]] = {choice_name(self.default, way): [] for way in ways}
        differs, failed = [], set()
        for way in ways:
            began = time.perf_counter()
            try:
                _, found = self._time(way, 0)
                if way.compiled and not base.compiled:
                    self._time(way, 1)  # Another shape may be compiled again.
                    self._compile_seconds = time.perf_counter() - began
            except RuntimeError:
                # The compiler fails, or memory runs out: the run needs none of the ways but the default.
                self._trainer.model_wrapped.zero_grad(set_to_none=True)
                failed.add(way)
                found = math.inf
            if not abs(found - loss) <= _LOSS_TOLERANCE * max(1.0, abs(loss)):
                differs.append(choice_name(self.default, way))
        for number in range(_ROUNDS):
            beside, _ = self._time(base, number % 2)
            for way in ways:
                ratios = times[choice_name(self.default, way)]
                if way not in failed and (not ratios or min(ratios) < _HOPELESS):
                    ratios.append(self._time(way, number % 2)[0] / beside)
        medians = {name: round(statistics.median(ratios), 4) if ratios else math.inf for name, ratios in times.items()}
        return medians, {name: max(ratios, default=math.inf) for name, ratios in times.items()}, tuple(differs)

    def _together(self, winners: Sequence[Choice], ratios: dict[Choice, float], loss: float) -> Choice:
        """Return the best of the ways that won, or all of them together if that is no slower."""
        best: dict[str, Choice] = {}
        for way in sorted(winners, key=lambda one: ratios[one], reverse=True):
            best[next(iter(self.default.differences(way)))] = way
        if not best:
            return self.default
        first = min(best.values(), key=lambda one: ratios[one])
        if len(best) == 1:
            return first
        values = {name: value for way in best.values() for name, value in self.default.differences(way).items()}
        joined = self.default.with_values(values)
        found, _, differs = self._ratios(first, [joined], loss)
        return joined if not differs and next(iter(found.values())) <= 1.0 else first

    def _time(self, choice: Choice, number: int) -> tuple[float, float]:
        """Compute the loss and the gradients of some packs.

        Returns:
            The seconds of a micro-batch of the default, and the loss per target of all packs.
        """
        trainer = self._trainer
        self._apply(choice)
        available = len(trainer.train_dataset)
        first = available // 2 if number else 0
        last = min(first + self._packs, available)
        parts = [(start, min(start + choice.micro_batch, last)) for start in range(first, last, choice.micro_batch)]
        batches = [trainer.micro_batch(*part) for part in parts]
        targets = max(1, sum(int((batch["labels"] >= 0).sum()) for batch in batches))
        torch.manual_seed(0)
        total = 0.0
        start = time.perf_counter()
        # Gradients that are not exchanged leave DDP's buckets as they are.
        with trainer.accelerator.no_sync(trainer.model_wrapped):
            for batch in batches:
                with trainer.compute_loss_context_manager():
                    loss = trainer.model_wrapped(**trainer.model_inputs(batch), supervised=True).loss / targets
                loss.backward()
                total += float(loss.detach())
        seconds = time.perf_counter() - start
        trainer.model_wrapped.zero_grad(set_to_none=True)
        packs = last - first
        return seconds * min(self.default.micro_batch, packs) / packs, total

    @contextmanager
    def _left_as_it_was(self) -> Iterator[None]:
        """Restore random numbers, buffers and the mode of the model at the end of the block."""
        model = self._trainer.model_wrapped
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        python, numpy, was_training = random.getstate(), np.random.get_state(), model.training
        model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            model.train(was_training)
            random.setstate(python)
            np.random.set_state(numpy)
            for name, buffer in model.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
