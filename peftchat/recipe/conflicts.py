"""Keys that can have no effect beside another setting of the same recipe.

Where the other setting was laid on top (by a flag, or by the file that extends), it wins and the key goes back to
its default: `--set method=full` needs no second flag to remove an adapter. Written side by side, the two are an
error. A resolved recipe leaves such keys out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftchat.recipe.document import Document, Keys, dotted
from peftchat.recipe.problems import Problem
from peftchat.recipe.schema import Recipe
from peftchat.variants import entry

ZERO_STRATEGIES = ("zero2", "zero3")


@dataclass(frozen=True)
class Conflict:
    """A key without effect, why, and the key that takes it away (where several do, the `others` as well)."""

    keys: Keys
    because: Keys
    why: str
    others: tuple[Keys, ...] = ()


def find_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """All keys of `recipe` that have no effect, whether they were written or hold their default."""
    yield from _method(recipe)
    yield from _chat_and_data(recipe)
    yield from _optimizer(recipe)
    yield from _saving(recipe)
    yield from _evaluation(recipe)
    yield from _distributed(recipe)


def _method(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.method == "full" and recipe.adapter is not None:
        yield Conflict(("adapter",), ("method",), "`method: full` trains all weights and has no adapter")
    if recipe.method != "full" and recipe.model.freeze_layers is not None:
        yield Conflict(("model", "freeze_layers"), ("method",), "an adapter leaves every layer of the base as it is")
    if recipe.method != "qlora" and recipe.quantization is not None:
        why = "quantised weights can only be trained through an adapter, by `method: qlora`"
        yield Conflict(("quantization",), ("method",), why)
    elif recipe.quantization is not None and recipe.quantization.bits == 8:
        for key in ("type", "double"):
            why = "only `quantization.bits: 4` has such a setting"
            yield Conflict(("quantization", key), ("quantization", "bits"), why)


def _chat_and_data(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.adapter is not None and recipe.data.packing:
        why = entry(recipe.adapter.variant).refuses.get("packing")
        if why is not None:
            yield Conflict(("data", "packing"), ("adapter", "variant"), why)
    if recipe.chat.template == "model":
        why = "`chat.template: model` adds no tokens"
        yield Conflict(("chat", "new_token_init"), ("chat", "template"), why)
    if recipe.data.eval is not None and recipe.data.eval_fraction is not None:
        why = "there are held-out sources in `data.eval` already"
        yield Conflict(("data", "eval_fraction"), ("data", "eval"), why)
        yield Conflict(("data", "eval"), ("data", "eval_fraction"), "a share of `data.train` is held out already")


def _optimizer(recipe: Recipe) -> Iterator[Conflict]:
    training = recipe.training
    if training.lr_scheduler_type == "constant":
        why = "a `constant` schedule has no warm-up; `constant_with_warmup` does"
        yield Conflict(("training", "warmup_steps"), ("training", "lr_scheduler_type"), why)
    if training.rows_per_step is not None:
        why = "it follows from `rows_per_step`"
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            yield Conflict(("training", key), ("training", "rows_per_step"), why)
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
    if recipe.data.has_eval:
        if training.eval_strategy != "steps":
            why = f"`eval_strategy` is `{training.eval_strategy}`"
            yield Conflict(("training", "eval_steps"), ("training", "eval_strategy"), why)
        return
    why = "there is nothing to evaluate on: give `data.eval` or `data.eval_fraction`"
    keys: list[Keys] = [("data", "max_eval_rows"), ("training", "eval_steps")]
    if training.eval_strategy != "no":
        keys.append(("training", "eval_strategy"))
    if training.eval_on_start:
        keys.append(("training", "eval_on_start"))
    for key in keys:
        yield Conflict(key, ("data", "eval_fraction"), why, others=(("data", "eval"),))


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


def settle(document: Document, conflicts: Sequence[Conflict]) -> bool:
    """Take out of `document` every key that loses to a setting laid on top of it; True if there was one."""
    beaten = [conflict for conflict in conflicts if _is_beaten(document, conflict)]
    for keys in {conflict.keys for conflict in beaten}:
        document.remove(keys)
    return bool(beaten)


def _is_beaten(document: Document, conflict: Conflict) -> bool:
    own = document.layer(conflict.keys)
    above = [document.layer(because) for because in (conflict.because, *conflict.others)]
    return own is not None and any(layer is not None and layer > own for layer in above)


def conflict_problems(conflicts: Sequence[Conflict]) -> list[Problem]:
    """The conflicts that are left, as problems: each pair of keys that exclude each other is told once."""
    told: dict[Keys, Problem] = {}
    for conflict in conflicts:
        if conflict.because not in told:
            cure = f"Remove it, or change `{dotted(conflict.because)}`."
            told[conflict.keys] = Problem(conflict.keys, f"has no effect: {conflict.why}", cure)
    return list(told.values())
