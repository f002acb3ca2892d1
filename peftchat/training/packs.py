"""Packs: the batches of a run's splits, from the examples that share a pack to their collator."""

import math
from typing import TYPE_CHECKING, Any

from peftchat.dataset.collator import ChatCollator
from peftchat.dataset.epochs import EpochPacks
from peftchat.dataset.packing import pack
from peftchat.dataset.pairs import LabelCollator, PairCollator, pair_packs
from peftchat.training.context import TrainContext

if TYPE_CHECKING:
    from datasets import Dataset

    from peftchat.dataset.cache import Split
    from peftchat.dataset.collator import BatchLayout
    from peftchat.recipe import TrainingSection


def make_collator(context: TrainContext, split: "Split", layout: "BatchLayout") -> ChatCollator:
    """Return the collator of a split."""
    recipe, chat = context.recipe, context.chat
    kind = LabelCollator if recipe.has_labels else PairCollator if recipe.has_pairs else ChatCollator
    return kind(
        context.splits[split].store,
        loss_on=recipe.chat.loss_policy,
        layout=layout,
        pad_token_id=chat.tokenizer.pad_token_id,
        pad_to_multiple_of=recipe.data.pad_to_multiple_of,
        tracked_token_ids=[token.id for token in chat.new_tokens],
    )


def make_packs(
    context: TrainContext, split: "Split", layout: "BatchLayout", epochs: EpochPacks | None = None
) -> "Dataset":
    """Return the packs of a split: the indices of the examples of each, as the collator takes them.

    Args:
        context: the run.
        split: the split.
        layout: how batches are laid out.
        epochs: where each epoch has packs of its own, those; the first epoch's are returned.
    """
    from datasets import Dataset

    recipe, store = context.recipe, context.splits[split].store
    if epochs is not None:
        return Dataset.from_dict({"examples": epochs.of_epoch(0)})
    if recipe.has_pairs:
        pairs = pair_packs(len(store))
        longest = {"length": [max(store.lengths[pair]) for pair in pairs]} if layout == "padded" else {}
        return Dataset.from_dict({"examples": pairs, **longest})
    if recipe.data.packing:
        return Dataset.from_dict({"examples": pack(store.lengths, recipe.data.max_length, recipe.training.seed)})
    columns: dict[str, Any] = {"examples": [[index] for index in range(len(store))]}
    if layout == "padded":
        columns["length"] = store.lengths
    return Dataset.from_dict(columns)


def optimizer_steps(training: "TrainingSection", sequences: int, processes: int) -> int:
    """Return the optimizer steps of a run.

    Args:
        training: the recipe's section.
        sequences: examples or packs of an epoch.
        processes: those of the run, on all machines.
    """
    if training.max_steps > 0:
        return training.max_steps
    per_epoch = steps_per_epoch(
        sequences, training.per_device_train_batch_size * processes, training.gradient_accumulation_steps
    )
    return math.ceil(per_epoch * training.num_train_epochs)


def steps_per_epoch(sequences: int, per_pass: int, accumulation: int) -> int:
    """Return the optimizer steps of an epoch, as transformers' trainer counts them.

    Args:
        sequences: examples or packs of an epoch.
        per_pass: those of a forward pass of all processes.
        accumulation: forward passes of an optimizer step.
    """
    return max(1, math.ceil(math.ceil(sequences / per_pass) / accumulation))
