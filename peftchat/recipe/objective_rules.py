"""What an objective cannot be combined with, and which keys have no effect under it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftchat.recipe.error_messages import Problem
from peftchat.recipe.objectives import PAIR_OBJECTIVES

if TYPE_CHECKING:
    from peftchat.recipe.document import Keys
    from peftchat.recipe.schema import Recipe

_LOSS_ON = ("answers", "last_answer")
_TRUNCATION = ("drop", "error")


def objective_problems(recipe: "Recipe") -> Iterator[Problem]:
    """Return the settings that an objective with pairs cannot be combined with."""
    name = recipe.objective
    if recipe.chat.loss_on not in _LOSS_ON:
        what = f"`objective: {name}` compares answers, and `{recipe.chat.loss_on}` selects other text too"
        yield Problem(("chat", "loss_on"), what, "Use `answers`.")
    training = recipe.training
    if recipe.has_labels and training.per_device_train_batch_size < 2 and recipe.kto and recipe.kto.loss_type == "kto":
        what = "the KL term is a mean over the answers of a forward pass, and one answer is no mean"
        yield Problem(("training", "per_device_train_batch_size"), what, "Use 2 or more, as TRL asks for.")
    for kind, entries in (("train", recipe.data.train), ("eval", recipe.data.eval or ())):
        for number, entry in enumerate(entries):
            if recipe.has_labels and entry.oasst_pairs in ("adjacent", "all"):
                what = f"`{entry.oasst_pairs}` would label a reply both good and bad"
                yield Problem(("data", kind, number, "oasst_pairs"), what, "Use `best_worst`.")
    if training.global_batch_size is not None:
        what = f"`objective: {name}` counts pairs, and this key is not divided into batches of pairs"
        hint = "Give `per_device_train_batch_size` (pairs) and `gradient_accumulation_steps`."
        yield Problem(("training", "global_batch_size"), what, hint)


def objective_conflicts(recipe: "Recipe") -> "Iterator[tuple[Keys, Keys, str]]":
    """Yield the keys without effect, the key that is the reason, and the reason in words."""
    for name in PAIR_OBJECTIVES:
        if recipe.objective != name and getattr(recipe, name) is not None:
            yield (name,), ("objective",), f"`objective: {recipe.objective}` has no such options"
    if recipe.has_pairs:
        yield from _without_effect_on_pairs(recipe)
    else:
        for kind, entries in (("train", recipe.data.train), ("eval", recipe.data.eval or ())):
            for number, entry in enumerate(entries):
                if entry.oasst_pairs is not None:
                    why = f"`objective: {recipe.objective}` reads no pairs"
                    yield ("data", kind, number, "oasst_pairs"), ("objective",), why
    if recipe.dpo is not None and recipe.dpo.loss_type != "robust" and recipe.dpo.label_smoothing:
        yield ("dpo", "label_smoothing"), ("dpo", "loss_type"), "only `loss_type: robust` smooths labels"


def _without_effect_on_pairs(recipe: "Recipe") -> "Iterator[tuple[Keys, Keys, str]]":
    """Yield the settings of `sft` that nothing reads under an objective with pairs."""
    because, name, data = ("objective",), recipe.objective, recipe.data
    if data.packing:
        what = "labeled answers" if recipe.has_labels else "pairs"
        why = f"the {what} of a batch are one line without padding already, with `model.attention: auto`"
        yield ("data", "packing"), because, why
    if data.resample:
        yield ("data", "resample"), because, f"`objective: {name}` has the same pairs in each epoch"
    if data.truncation not in _TRUNCATION:
        why = "it would take turns from one answer of a pair and not from the other; `drop` and `error` do not"
        yield ("data", "truncation"), because, why
    if recipe.training.torch_compile:
        why = f"layers are not compiled under `objective: {name}`, which switches the adapter off and on"
        yield ("training", "torch_compile"), because, why
