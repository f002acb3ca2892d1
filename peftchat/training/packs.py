"""Packs: the batches of a run's splits, from the examples that share a pack to their collator."""

from typing import TYPE_CHECKING, Any

from peftchat.dataset.collator import ChatCollator
from peftchat.dataset.packing import pack
from peftchat.training.context import TrainContext

if TYPE_CHECKING:
    from datasets import Dataset

    from peftchat.dataset.cache import Split
    from peftchat.dataset.collator import BatchLayout


def make_collator(context: TrainContext, split: "Split", layout: "BatchLayout") -> ChatCollator:
    """Return the collator of a split."""
    recipe, chat = context.recipe, context.chat
    return ChatCollator(
        context.splits[split].store,
        loss_on=recipe.chat.loss_policy,
        layout=layout,
        pad_token_id=chat.tokenizer.pad_token_id,
        pad_to_multiple_of=recipe.data.pad_to_multiple_of,
        tracked_token_ids=[token.id for token in chat.new_tokens],
    )


def make_packs(context: TrainContext, split: "Split", layout: "BatchLayout") -> "Dataset":
    """Return the packs of a split: the indices of the examples of each, as the collator takes them."""
    from datasets import Dataset

    recipe, store = context.recipe, context.splits[split].store
    if recipe.data.packing:
        return Dataset.from_dict({"examples": pack(store.lengths, recipe.data.max_length, recipe.training.seed)})
    columns: dict[str, Any] = {"examples": [[index] for index in range(len(store))]}
    if layout == "padded":
        columns["length"] = store.lengths
    return Dataset.from_dict(columns)
