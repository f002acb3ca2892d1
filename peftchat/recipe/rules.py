"""Combinations of settings that no machine can run, and those that this one cannot."""

from collections.abc import Iterator
from importlib.util import find_spec

from peftchat.recipe.problems import Problem
from peftchat.recipe.schema import Recipe
from peftchat.variants import entry

_NEEDED_BY_SCHEDULE = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Schedules with no default end -> the options of which one must be given."""


def impossible(recipe: Recipe) -> Iterator[Problem]:
    """What cannot work anywhere."""
    training = recipe.training
    if training.max_steps == 0 or training.max_steps < -1:
        cure = "Give a number above 0, or -1 to train for `num_train_epochs`."
        yield Problem(("training", "max_steps"), f"must be above 0 or -1, got {training.max_steps}", cure)
    if training.warmup_steps > 1 and not training.warmup_steps.is_integer():
        what = f"a number of steps must be whole, got {training.warmup_steps}"
        yield Problem(("training", "warmup_steps"), what, "Below 1 it is a share of all steps.")
    budgets = [key for key in ("max_tokens", "max_minutes") if getattr(training, key) is not None]
    if budgets and training.warmup_steps > 1:
        what = f"with `{budgets[0]}` the schedule follows the budget, and a warm-up in steps has no place in it"
        yield Problem(("training", "warmup_steps"), what, "Give a share below 1 such as 0.03.")
    if 0 < training.max_steps < training.warmup_steps:
        what = f"the warm-up ({training.warmup_steps:g} steps) is longer than the run ({training.max_steps})"
        cure = "Lower it, or give a share below 1 such as 0.03."
        yield Problem(("training", "warmup_steps"), what, cure)
    needed = _NEEDED_BY_SCHEDULE.get(training.lr_scheduler_type, ())
    given = [key for key in needed if key in (training.lr_scheduler_kwargs or {})]
    if needed and len(given) != 1:
        what = f"`{training.lr_scheduler_type}` needs one of: {', '.join(needed)}"
        example = f"Add `{needed[-1]}` to `lr_scheduler_kwargs`." if not given else "Remove one of the two."
        yield Problem(("training", "lr_scheduler_kwargs"), what, example)
    if recipe.model.dtype == "float32" and recipe.model.attention.startswith("flash_attention"):
        what = f"`{recipe.model.attention}` computes in 16 bits and the model is in float32"
        yield Problem(("model", "attention"), what, "Use `auto`, or `model.dtype: bfloat16`.")
    if recipe.distributed.strategy == "zero3" and recipe.quantization and recipe.quantization.bits == 8:
        what = "ZeRO-3 cannot shard 8-bit weights, whose storage is an integer type"
        yield Problem(("quantization", "bits"), what, "Use 4 bits, or `distributed.strategy: ddp`.")
    yield from _of_the_variant(recipe)


def _of_the_variant(recipe: Recipe) -> Iterator[Problem]:
    """What the adapter does not go together with."""
    if recipe.adapter is None:
        return
    variant = entry(recipe.adapter.variant)
    base = "unquantised" if recipe.quantization is None else f"{recipe.quantization.bits} bits"
    if variant.why_not(base) is not None:
        held = "an unquantised base" if base == "unquantised" else f"a base in {base}"
        cure = "Use `method: qlora`" if base == "unquantised" else "Use `method: lora`"
        what = f"`{variant.name}` does not work on {held}: {variant.why_not(base)}"
        yield Problem(("adapter", "variant"), what, f"{cure}, or another variant (`peftchat variants`).")
    if variant.name == "adalora" and (recipe.training.max_tokens or recipe.training.max_minutes):
        key = "max_tokens" if recipe.training.max_tokens else "max_minutes"
        what = "`adalora` moves its ranks by a schedule over steps, and this budget does not say how many there are"
        yield Problem(("training", key), what, "Give `max_steps` or `num_train_epochs`.")
    strategy: str = recipe.distributed.strategy
    if variant.why_not(strategy) is not None:
        what = f"`{variant.name}` does not work under `{strategy}`: {variant.why_not(strategy)}"
        yield Problem(("distributed", "strategy"), what, "Use `ddp`, or another variant (`peftchat variants`).")
    if recipe.training.gradient_checkpointing and variant.why_not("checkpointing") is not None:
        what = f"`{variant.name}` does not work with it: {variant.why_not('checkpointing')}"
        yield Problem(("training", "gradient_checkpointing"), what, "Write `false`.")


def missing_here(recipe: Recipe) -> Iterator[Problem]:
    """What this machine lacks."""
    for name in recipe.training.report_to:
        if find_spec(name) is None:
            what = f"the package `{name}` is not installed"
            yield Problem(("training", "report_to"), what, f"Run `pip install {name}`, or write `none`.")
