"""The trainer of a run, put together from its model, rows and arguments."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.registry import ChatFormat
from peftchat.dataset.cache import EncodedSplit, Split
from peftchat.dataset.collator import BatchLayout, ChatCollator
from peftchat.dataset.packing import pack
from peftchat.runs.metrics_file import MetricsFile
from peftchat.runs.run_folder import RunFolder, token_counts_of
from peftchat.training.attention import settle_attention
from peftchat.training.build import Built
from peftchat.training.meter import Totals
from peftchat.training.progress import MetricsCallback, ProgressCallback
from peftchat.training.trainer import ChatTrainer
from peftchat.training.variant_parts import variant_parts

if TYPE_CHECKING:
    from datasets import Dataset

    from peftchat.recipe import Recipe


def make_trainer(
    recipe: "Recipe",
    folder: RunFolder,
    arguments: Any,
    built: Built,
    chat: ChatFormat,
    rows: dict[Split, EncodedSplit],
    checkpoint: Path | None,
    progress: ProgressCallback,
) -> ChatTrainer:
    """The trainer, with the attention settled and batches laid out for it.

    Args:
        arguments: TRL's arguments; told how to draw rows.
        progress: shows the run on the terminal.
    """
    layout = settle_attention(recipe, built.model, built.causal_model)
    if layout == "padded":
        # Rows of like length share a batch, so that little of it is padding.
        arguments.train_sampling_strategy = "group_by_length"

    def collator(side: Split) -> ChatCollator:
        return ChatCollator(
            rows[side].store,
            loss_on=recipe.chat.loss_on,
            layout=layout,
            pad_token_id=chat.tokenizer.pad_token_id,
            pad_to_multiple_of=recipe.data.pad_to_multiple_of,
            watched=[token.id for token in chat.new_tokens],
        )

    return ChatTrainer(
        built.model,
        arguments,
        train_packs=_packs(recipe, rows["train"], layout),
        train_collator=collator("train"),
        eval_packs=_packs(recipe, rows["eval"], layout) if "eval" in rows else None,
        eval_collator=collator("eval") if "eval" in rows else None,
        tokenizer=chat.tokenizer,
        callbacks=[MetricsCallback(MetricsFile(folder.metrics)), progress],
        totals=_totals_so_far(checkpoint),
        parts=variant_parts(recipe, built.model),
    )


def _packs(recipe: "Recipe", rows: EncodedSplit, layout: BatchLayout) -> "Dataset":
    """The rows of each sequence as the data set that the trainer draws from."""
    from datasets import Dataset

    lengths = rows.store.lengths
    if recipe.data.packing:
        return Dataset.from_dict({"rows": pack(lengths, recipe.data.max_length, recipe.training.seed)})
    columns: dict[str, Any] = {"rows": [[index] for index in range(len(rows.store))]}
    if layout == "padded":
        columns["length"] = lengths
    return Dataset.from_dict(columns)


def _totals_so_far(checkpoint: Path | None) -> Totals | None:
    """This process's counts at the checkpoint; with another number of processes, the first one takes all."""
    if checkpoint is None:
        return None
    everyone = [Totals(**counts) for counts in token_counts_of(checkpoint)]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if len(everyone) == world:
        return everyone[rank]
    together = Totals.together(everyone)
    return together if rank == 0 else Totals(seen=[0] * len(together.seen), seen_before_target=[0] * len(together.seen))
