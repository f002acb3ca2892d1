"""What does not work in a recipe, what has no effect, and the recipe as YAML and as arguments."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from peftchat.chat_template.templates import CHAT_TEMPLATES
from peftchat.recipe.document import Document, Keys, dotted, make_absolute
from peftchat.recipe.error_messages import Problem
from peftchat.recipe.memory_rules import memory_conflicts
from peftchat.recipe.objective_rules import objective_conflicts, objective_problems
from peftchat.recipe.schema import OWN_KEYS, Recipe

_WITH_MINIMUM = ("num_cycles", "min_lr", "min_lr_rate")

SCHEDULE_OPTIONS = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": _WITH_MINIMUM,
    "cosine_warmup_with_min_lr": (*_WITH_MINIMUM, "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""Schedule -> the options that transformers takes for it. They are listed here as importing it takes seconds."""

_NEEDED_BY_SCHEDULE = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Schedules without a default end -> options, one of which must be given."""


def invalid_combinations(recipe: Recipe) -> Iterator[Problem]:
    """Return the combinations that cannot work on any machine."""
    training = recipe.training
    if training.max_steps == 0 or training.max_steps < -1:
        hint = "Give a number above 0, or -1 to train for `num_train_epochs`."
        yield Problem(("training", "max_steps"), f"must be above 0 or -1, got {training.max_steps}", hint)
    if training.warmup_steps > 1 and not training.warmup_steps.is_integer():
        what = f"a number of steps must be whole, got {training.warmup_steps}"
        yield Problem(("training", "warmup_steps"), what, "Below 1 it is a share of all steps.")
    budgets = [key for key in ("max_train_tokens", "max_train_minutes") if getattr(training, key) is not None]
    if budgets and training.warmup_steps > 1:
        what = f"must be a fraction when `{budgets[0]}` sets the run length, got {training.warmup_steps:g}"
        yield Problem(("training", "warmup_steps"), what, "Give a fraction below 1 such as 0.03.")
    if 0 < training.max_steps < training.warmup_steps:
        what = f"the warm-up ({training.warmup_steps:g} steps) is longer than the run ({training.max_steps})"
        hint = "Lower it, or give a share below 1 such as 0.03."
        yield Problem(("training", "warmup_steps"), what, hint)
    options = SCHEDULE_OPTIONS[training.lr_scheduler_type]
    for key in training.lr_scheduler_kwargs or {}:
        if key not in options:
            known = f"It takes {', '.join(options)}." if options else "It takes none: remove them."
            what = f"`{training.lr_scheduler_type}` has no option `{key}`"
            yield Problem(("training", "lr_scheduler_kwargs"), what, known)
    needed = _NEEDED_BY_SCHEDULE.get(training.lr_scheduler_type, ())
    given = [key for key in needed if key in (training.lr_scheduler_kwargs or {})]
    if needed and len(given) != 1:
        what = f"`{training.lr_scheduler_type}` needs one of: {', '.join(needed)}"
        example = f"Add `{needed[-1]}` to `lr_scheduler_kwargs`." if not given else "Remove one of the two."
        yield Problem(("training", "lr_scheduler_kwargs"), what, example)
    if recipe.model.computed_in == "float32" and recipe.model.attention.startswith("flash_attention"):
        what = f"`{recipe.model.attention}` computes in 16 bits and the model computes in float32"
        key = "dtype" if recipe.model.compute_dtype == "auto" else "compute_dtype"
        yield Problem(("model", "attention"), what, f"Use `auto`, or `model.{key}: bfloat16`.")
    if recipe.distributed.strategy == "zero3" and recipe.quantization and recipe.quantization.bits == 8:
        what = "ZeRO-3 cannot shard 8-bit weights, whose storage is an integer type"
        yield Problem(("quantization", "bits"), what, "Use 4 bits, or `distributed.strategy: ddp`.")
    if recipe.data.resample and all(entry.weight == int(entry.weight) for entry in recipe.data.train):
        what = "every `weight` is a whole number, so that each epoch has all conversations and nothing is drawn"
        yield Problem(("data", "resample"), what, "Remove it, or give a source a weight such as 0.5.")
    yield from _of_the_variant(recipe)
    if recipe.has_pairs:
        yield from objective_problems(recipe)


def _of_the_variant(recipe: Recipe) -> Iterator[Problem]:
    """Return the settings that the adapter cannot be combined with."""
    if recipe.adapter is None:
        return
    variant = recipe.adapter
    yield from (Problem(("adapter", key), what) for key, what in variant.wrong_settings())
    base = "unquantized" if recipe.quantization is None else f"{recipe.quantization.bits} bits"
    if variant.incompatibility(base) is not None:
        held = "an unquantized base" if base == "unquantized" else f"a base in {base}"
        hint = "Use `method: qlora`" if base == "unquantized" else "Use `method: lora`"
        what = f"`{variant.name}` does not work on {held}: {variant.incompatibility(base)}"
        yield Problem(("adapter", "variant"), what, f"{hint}, or another variant (`peftchat variants`).")
    reason = variant.incompatibility("budget")
    if reason is not None and (recipe.training.max_train_tokens or recipe.training.max_train_minutes):
        key = "max_train_tokens" if recipe.training.max_train_tokens else "max_train_minutes"
        what = f"`{variant.name}` does not work with it: {reason}"
        yield Problem(("training", key), what, "Give `max_steps` or `num_train_epochs`.")
    strategy: str = recipe.distributed.strategy
    if variant.incompatibility(strategy) is not None:
        what = f"`{variant.name}` does not work under `{strategy}`: {variant.incompatibility(strategy)}"
        yield Problem(("distributed", "strategy"), what, "Use `ddp`, or another variant (`peftchat variants`).")
    if recipe.training.gradient_checkpointing and variant.incompatibility("checkpointing") is not None:
        what = f"`{variant.name}` does not work with it: {variant.incompatibility('checkpointing')}"
        yield Problem(("training", "gradient_checkpointing"), what, "Write `false`.")


def missing_dependencies(recipe: Recipe) -> Iterator[Problem]:
    """Return the packages that the recipe needs and this machine lacks."""
    for name in recipe.training.report_to:
        if find_spec(name) is None:
            what = f"the package `{name}` is not installed"
            yield Problem(("training", "report_to"), what, f"Run `pip install {name}`, or write `none`.")


ZERO_STRATEGIES = ("zero2", "zero3")


@dataclass(frozen=True)
class Conflict:
    """A key without effect, the reason, and the key that causes it (`others` where several do)."""

    keys: Keys
    because: Keys
    why: str
    others: tuple[Keys, ...] = ()


def find_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Return all keys of `recipe` without effect, written or default."""
    yield from _method(recipe)
    for keys, because, why in objective_conflicts(recipe):
        yield Conflict(keys, because, why)
    yield from _chat_and_data(recipe)
    yield from _optimizer(recipe)
    for keys, because, why in memory_conflicts(recipe):
        yield Conflict(keys, because, why)
    yield from _saving(recipe)
    yield from _spikes(recipe)
    yield from _halving(recipe)
    yield from _evaluation(recipe)
    yield from _tasks(recipe)
    yield from _distributed(recipe)


def _method(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.method == "full" and recipe.adapter is not None:
        yield Conflict(("adapter",), ("method",), "`method: full` trains all weights and has no adapter")
    if recipe.method != "full" and recipe.model.freeze_layers is not None:
        yield Conflict(("model", "freeze_layers"), ("method",), "an adapter leaves every layer of the base as it is")
    if recipe.method != "qlora" and recipe.quantization is not None:
        why = "quantized weights can only be trained through an adapter, by `method: qlora`"
        yield Conflict(("quantization",), ("method",), why)
    elif recipe.quantization is not None and recipe.quantization.bits == 8:
        for key in ("type", "double"):
            why = "only `quantization.bits: 4` has such a setting"
            yield Conflict(("quantization", key), ("quantization", "bits"), why)


def _chat_and_data(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.adapter is not None and recipe.data.packing:
        why = recipe.adapter.incompatibility("packing")
        if why is not None:
            yield Conflict(("data", "packing"), ("adapter", "variant"), why)
    if recipe.chat.template not in CHAT_TEMPLATES:
        why = f"`chat.template: {recipe.chat.template}` adds no tokens"
        yield Conflict(("chat", "new_token_init"), ("chat", "template"), why)
    else:
        for key in ("template_kwargs", "template_date", "end_token"):
            if getattr(recipe.chat, key):
                why = "only `chat.template: model` and a template of your own have such a setting"
                yield Conflict(("chat", key), ("chat", "template"), why)
    if recipe.data.eval is not None and recipe.data.eval_fraction is not None:
        why = "there are held-out sources in `data.eval` already"
        yield Conflict(("data", "eval_fraction"), ("data", "eval"), why)
        yield Conflict(("data", "eval"), ("data", "eval_fraction"), "a share of `data.train` is held out already")


def _optimizer(recipe: Recipe) -> Iterator[Conflict]:
    training = recipe.training
    if training.lr_scheduler_type == "constant":
        why = "a `constant` schedule has no warm-up; `constant_with_warmup` does"
        yield Conflict(("training", "warmup_steps"), ("training", "lr_scheduler_type"), why)
    if training.global_batch_size is not None:
        why = "it follows from `global_batch_size`"
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            yield Conflict(("training", key), ("training", "global_batch_size"), why)
    if not training.gradient_checkpointing:
        because = ("training", "gradient_checkpointing")
        why = "`gradient_checkpointing` is not switched on"
        yield Conflict(("training", "gradient_checkpointing_kwargs"), because, why)
    optim = training.optim
    unused: list[str] = [] if "ademamix" in optim else ["optim_args"]
    if optim in ("adafactor", "adagrad", "rmsprop", "sgd"):
        unused += ["adam_beta1", "adam_beta2", "adam_epsilon"]
    elif "lion" in optim:
        unused += ["adam_epsilon"]
    for key in unused:
        why = f"`optim: {optim}` does not read it"
        yield Conflict(("training", key), ("training", "optim"), why)


def _saving(recipe: Recipe) -> Iterator[Conflict]:
    strategy = recipe.training.save_strategy
    because = ("training", "save_strategy")
    if strategy != "steps":
        yield Conflict(("training", "save_steps"), because, f"`save_strategy` is `{strategy}`")
    if strategy == "no":
        yield Conflict(("training", "save_total_limit"), because, "`save_strategy` is `no`")


def _evaluation(recipe: Recipe) -> Iterator[Conflict]:
    training = recipe.training
    comparing: list[Keys] = []
    if training.load_best_model_at_end:
        comparing.append(("training", "load_best_model_at_end"))
    if training.early_stopping_patience is not None:
        comparing.append(("training", "early_stopping_patience"))
    yield from _without_comparison(recipe, comparing)
    if recipe.data.has_eval:
        why = f"`eval_strategy` is `{training.eval_strategy}`"
        if training.eval_strategy != "steps":
            yield Conflict(("training", "eval_steps"), ("training", "eval_strategy"), why)
        for key in comparing if training.eval_strategy == "no" else ():
            yield Conflict(key, ("training", "eval_strategy"), why)
        return
    why = "there is nothing to evaluate on: give `data.eval` or `data.eval_fraction`"
    keys: list[Keys] = [*comparing, ("data", "max_eval_samples"), ("training", "eval_steps")]
    if training.eval_strategy != "no":
        keys.append(("training", "eval_strategy"))
    if training.eval_on_start:
        keys.append(("training", "eval_on_start"))
    for key in keys:
        yield Conflict(key, ("data", "eval_fraction"), why, others=(("data", "eval"),))


def _tasks(recipe: Recipe) -> Iterator[Conflict]:
    if not recipe.evaluation.tasks:
        for key in ("include", "limit", "chat_template"):
            yield Conflict(("evaluation", key), ("evaluation", "tasks"), "no task is named in `evaluation.tasks`")


def _without_comparison(recipe: Recipe, comparing: Sequence[Keys]) -> Iterator[Conflict]:
    """Return the settings of the best evaluation and of early stopping that nothing reads."""
    training = recipe.training
    if training.early_stopping_patience is None and training.early_stopping_threshold:
        why = "`early_stopping_patience` is not set"
        yield Conflict(("training", "early_stopping_threshold"), ("training", "early_stopping_patience"), why)
    is_used = comparing and recipe.data.has_eval and training.eval_strategy != "no"
    if not is_used and training.metric_for_best_model != "eval_loss":
        why = "neither `load_best_model_at_end` nor `early_stopping_patience` is set"
        yield Conflict(("training", "metric_for_best_model"), ("training", "load_best_model_at_end"), why)


def _spikes(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.training.on_spike != "skip":
        return
    keys = ("training", "on_spike")
    if recipe.distributed.strategy in ZERO_STRATEGIES:
        why = "DeepSpeed updates the weights by itself, so no update can be left out"
        yield Conflict(keys, ("distributed", "strategy"), why)
    if recipe.model.dtype == "float16":
        yield Conflict(keys, ("model", "dtype"), "float16's loss scaling needs the gradients of every step")
    if recipe.adapter is not None and recipe.adapter.variant == "adalora":
        yield Conflict(keys, ("adapter",), "AdaLoRA's ranks follow the gradients of every step")


def _halving(recipe: Recipe) -> Iterator[Conflict]:
    distributed = recipe.distributed
    if recipe.training.on_oom != "halve":
        return
    if recipe.has_pairs:
        what = "takes its KL term over" if recipe.has_labels else "compares"
        why = f"`objective: {recipe.objective}` {what} answers of one micro-batch"
        yield Conflict(("training", "on_oom"), ("objective",), why)
    why = "several processes have to take each step alike, and only one of them runs out of memory"
    if distributed.strategy not in ("auto", "single"):
        yield Conflict(("training", "on_oom"), ("distributed", "strategy"), why)
    for key in ("processes", "nodes"):
        if getattr(distributed, key) not in (None, 1):
            yield Conflict(("training", "on_oom"), ("distributed", key), why)


def _distributed(recipe: Recipe) -> Iterator[Conflict]:
    distributed = recipe.distributed
    because = ("distributed", "strategy")
    if distributed.strategy == "single":
        for key in ("processes", "nodes"):
            if getattr(distributed, key) not in (None, 1):
                yield Conflict(("distributed", key), because, "`strategy: single` is one process")
    if distributed.strategy in ZERO_STRATEGIES and recipe.training.torch_compile:
        why = f"under `{distributed.strategy}` layers are never compiled"
        yield Conflict(("training", "torch_compile"), because, why)
    if distributed.strategy in ZERO_STRATEGIES and recipe.model.computed_in != recipe.model.dtype:
        yield Conflict(("model", "compute_dtype"), because, "DeepSpeed computes in the dtype of the weights")
    if distributed.strategy not in ZERO_STRATEGIES:
        why = "only the strategies `zero2` and `zero3` run on DeepSpeed"
        yield Conflict(("distributed", "deepspeed_config"), because, why)
        if distributed.offload != "none":
            yield Conflict(("distributed", "offload"), because, why)
    elif distributed.offload == "all" and distributed.strategy == "zero2":
        why = "`zero2` keeps the weights whole on each device; `zero3` can offload them"
        yield Conflict(("distributed", "offload"), because, why)
    elif distributed.deepspeed_config is not None:
        why = "the DeepSpeed file decides about offloading"
        yield Conflict(("distributed", "offload"), ("distributed", "deepspeed_config"), why)


def resolve_defaults(document: Document, conflicts: Sequence[Conflict]) -> bool:
    """Remove keys that a setting of a higher layer makes ineffective; return whether there was one."""
    beaten = [conflict for conflict in conflicts if _is_beaten(document, conflict)]
    for keys in {conflict.keys for conflict in beaten}:
        document.remove(keys)
    return bool(beaten)


def _is_beaten(document: Document, conflict: Conflict) -> bool:
    own = document.layer(conflict.keys)
    above = [document.layer(because) for because in (conflict.because, *conflict.others)]
    return own is not None and any(layer is not None and layer > own for layer in above)


def conflict_problems(conflicts: Sequence[Conflict]) -> list[Problem]:
    """Return the remaining conflicts as problems: one for each pair of keys that exclude each other."""
    reported: dict[Keys, Problem] = {}
    for conflict in conflicts:
        if conflict.because not in reported:
            hint = f"Remove it, or change `{dotted(conflict.because)}`."
            reported[conflict.keys] = Problem(conflict.keys, f"has no effect: {conflict.why}", hint)
    return list(reported.values())


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return every key of `recipe` that has a value and an effect, as plain values."""
    idle = {conflict.keys for conflict in find_conflicts(recipe)}
    values: dict[str, Any] = {}
    for name, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            value = {key: held for key, held in value.items() if held is not None and (name, key) not in idle}
        if value is not None and (name,) not in idle:
            values[name] = value
    for source in (source for kind in ("train", "eval") for source in values["data"].get(kind, ())):
        if source["split"] is None:
            del source["split"]
    return values


def dump_recipe(recipe: Recipe) -> str:
    """Return `recipe` as YAML with all defaults and with absolute local paths."""
    values = recipe_values(recipe)
    make_absolute(values)
    yaml = YAML()
    # YAML reads these as line breaks unless they are escaped, and then all of the text is.
    yaml.allow_unicode = not re.search("[\x85\u2028\u2029]", json.dumps(values, ensure_ascii=False))
    text = StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def training_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the `training` section as keyword arguments for transformers' TrainingArguments.

    Keys without effect are left out. Evaluation is off where there is nothing to evaluate on.
    """
    arguments: dict[str, Any] = recipe_values(recipe)["training"]
    for key in OWN_KEYS:
        arguments.pop(key, None)
    arguments |= {"logging_first_step": True, "logging_nan_inf_filter": False}
    if not recipe.data.has_eval:
        arguments |= {"eval_strategy": "no", "eval_on_start": False}
    return arguments
