"""A recipe's `training` section as TRL's arguments."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.recipe import training_arguments
from peftchat.training.placement import Placement

if TYPE_CHECKING:
    from trl import SFTConfig

    from peftchat.recipe import Recipe


def sft_config(
    recipe: "Recipe",
    placement: Placement,
    folder: Path,
    *,
    deepspeed: dict[str, Any] | None,
    resuming: bool,
) -> "SFTConfig":
    """TRL's arguments for the run.

    Args:
        folder: the run folder.
        deepspeed: DeepSpeed's configuration, if it has a part.
        resuming: whether the run goes on from a checkpoint; the evaluation before the first step then is done.
    """
    from trl import SFTConfig

    on_cpu = placement.gpus == 0
    arguments = training_arguments(recipe)
    # Left out, TRL would switch it on.
    arguments.setdefault("gradient_checkpointing", False)
    if recipe.training.gradient_checkpointing:
        arguments.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if resuming:
        arguments["eval_on_start"] = False
    arguments["report_to"] = arguments.get("report_to") or "none"
    return SFTConfig(
        **arguments,
        output_dir=str(folder / "checkpoints"),
        bf16=recipe.model.dtype == "bfloat16",
        fp16=recipe.model.dtype == "float16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and placement.world_size > 1 else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        deepspeed=deepspeed,
        # Rows come encoded, packed and labelled; TRL is to leave them alone.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        log_level="error",
    )
