"""Hints on a recipe: what published evidence warns of, with the numbers of this run."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.console import stderr
from peftchat.dataset.mixture import examples_per_epoch
from peftchat.errors import UserError
from peftchat.formatting import format_count, format_rate, format_short_count
from peftchat.models.added_tokens import find_added_tokens
from peftchat.training.packs import optimizer_steps
from peftchat.training.rate_rule import SOURCE, rule_rate
from peftchat.training.throughput import unsharded_numel
from peftchat.variants.base import TargetedAdapter
from peftchat.variants.model_shape import in_attention

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.training.context import TrainContext
    from peftchat.training.model import TrainableModel

_LORA_SOURCE = "https://thinkingmachines.ai/blog/lora/"

_MAX_CONVERSATIONS = 32
"""Conversations of a step beyond which LoRA learns less than full fine-tuning:
https://huggingface.co/docs/trl/main/en/lora_without_regret"""

_BATCH_SOURCE = "https://huggingface.co/docs/trl/main/en/lora_without_regret"

_MAX_RATE_FACTOR = 5.0
"""How far from the rule a rate may lie before it is told."""


@dataclass(frozen=True, slots=True)
class RunSize:
    """The sizes of a run that hints compare.

    Attributes:
        trainable: parameters that are trained, without the embeddings of added tokens.
        attention_only: whether all of them lie in attention.
        supervised_tokens: supervised tokens that the run sees, each counted once; None if the data was not read.
        conversations_per_step: mean number of conversations in an optimizer step; None if the data was not read.
    """

    trainable: int
    attention_only: bool
    supervised_tokens: int | None = None
    conversations_per_step: float | None = None

    @classmethod
    def of_steps(
        cls,
        trainable: int,
        *,
        attention_only: bool,
        supervised_tokens: int,
        conversations: int,
        sequences: int,
        sequences_per_step: int,
        steps: int,
    ) -> "RunSize":
        """Return the sizes of a run on data that was read.

        Args:
            trainable: see the attribute.
            attention_only: see the attribute.
            supervised_tokens: those of an epoch.
            conversations: those of an epoch.
            sequences: examples or packs of an epoch.
            sequences_per_step: those of an optimizer step, of all processes.
            steps: optimizer steps of the run.
        """
        seen = min(1.0, steps * sequences_per_step / sequences)
        per_step = min(sequences_per_step, sequences) * conversations / sequences
        return cls(trainable, attention_only, round(seen * supervised_tokens), per_step)


def all_in_attention(parameters: Iterable[str]) -> bool:
    """Return whether there are parameters and all of them lie in attention, by their names."""
    names = list(parameters)
    return bool(names) and all(in_attention(name) for name in names)


def tell_hints(context: "TrainContext", model: "TrainableModel", *, sequences: int) -> None:
    """Tell what published evidence warns of, one line each, in the main process.

    Args:
        context: the run.
        model: what it trains.
        sequences: examples or packs of an epoch.
    """
    if not context.is_main:
        return
    added = find_added_tokens(model.causal_model)
    added_ids = set() if added is None else {id(parameter) for parameter in added.parameters()}
    own = {
        name: unsharded_numel(one)
        for name, one in model.model.named_parameters()
        if one.requires_grad and id(one) not in added_ids
    }
    training, split = context.recipe.training, context.splits["train"]
    processes = context.distributed.world_size
    examples = examples_per_epoch(context.recipe, split.stats)
    size = RunSize.of_steps(
        sum(own.values()),
        attention_only=all_in_attention(own),
        supervised_tokens=round(split.stats.supervised * examples / split.stats.examples),
        conversations=examples,
        sequences=sequences,
        sequences_per_step=training.per_device_train_batch_size * processes * training.gradient_accumulation_steps,
        steps=optimizer_steps(training, sequences, processes),
    )
    for hint in find_hints(context.recipe, size):
        stderr.print(f"Hint: {hint}", markup=False, highlight=False)


def find_hints(recipe: "Recipe", size: RunSize) -> tuple[str, ...]:
    """Return one line for each thing that the evidence warns of, and for each source that is listed twice.

    Args:
        recipe: the recipe; its rate may be `auto`.
        size: the sizes of its run.
    """
    lines = [*_repeated_hint(recipe), *_rate_hint(recipe)]
    if recipe.adapter is not None:
        lines += [*_capacity_hint(recipe, size), *_batch_hint(size), *_target_hint(recipe, size)]
    return tuple(lines)


def _repeated_hint(recipe: "Recipe") -> Iterator[str]:
    weights: dict[str, list[float]] = {}
    for entry in recipe.data.train:
        weights.setdefault(entry.model_copy(update={"weight": 1.0}).model_dump_json(), []).append(entry.weight)
    for source, listed in weights.items():
        if len(listed) > 1:
            path, total = json.loads(source)["path"], sum(listed)
            yield (
                f"data.train lists {path} {len(listed)} times, so each of its conversations is trained {total:g} times "
                f"in an epoch. List it once, with `weight: {total:g}` if that is what you want."
            )


def _capacity_hint(recipe: "Recipe", size: RunSize) -> Iterator[str]:
    tokens = size.supervised_tokens
    if tokens is None or size.trainable >= tokens:
        return
    cure = "raise adapter.r and keep adapter.alpha" if hasattr(recipe.adapter, "r") else "choose `lora` or `full`"
    yield (
        f"{format_short_count(size.trainable)} trained parameters for {format_short_count(tokens)} supervised tokens: "
        f"an adapter with fewer parameters than tokens can fall behind full fine-tuning ({_LORA_SOURCE}). "
        f"To learn more of the data, {cure}."
    )


def _batch_hint(size: RunSize) -> Iterator[str]:
    count = size.conversations_per_step
    if count is not None and count > _MAX_CONVERSATIONS:
        yield (
            f"an optimizer step has about {format_count(round(count))} conversations: beyond {_MAX_CONVERSATIONS}, "
            "large batches cost adapters more than full fine-tuning, and a higher rank does not repair it "
            f"({_BATCH_SOURCE}). Lower training.gradient_accumulation_steps or training.per_device_train_batch_size."
        )


def _target_hint(recipe: "Recipe", size: RunSize) -> Iterator[str]:
    if isinstance(recipe.adapter, TargetedAdapter) and size.attention_only:
        yield (
            f"all {format_short_count(size.trainable)} trained parameters are in attention: adapters of all linear "
            f"layers learn more, also at equal size ({_LORA_SOURCE}). Set adapter.target_modules: all-linear."
        )


def _rate_hint(recipe: "Recipe") -> Iterator[str]:
    rate = recipe.training.learning_rate
    if rate == "auto":
        return
    try:
        rule = rule_rate(recipe)
    except UserError:
        return  # A rate that is given needs no width.
    ratio = rate / rule.value
    if 1 / _MAX_RATE_FACTOR <= ratio <= _MAX_RATE_FACTOR:
        return
    relation = f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
    where = SOURCE if "by the width" in rule.reason else "`peftchat variants`"
    where = "docs/preferences.md" if recipe.has_pairs else where
    yield (
        f"the learning rate {format_rate(rate)} is {relation} the {format_rate(rule.value)} that "
        f"`training.learning_rate: auto` gives: {rule.reason} ({where})."
    )
