"""The DeepSpeed configuration of a run.

It never holds a scheduler: one in there silently beats `lr_scheduler_type`. Values marked `auto` are filled by
transformers from the training arguments.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.training.placement import Placement

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


def deepspeed_config(recipe: "Recipe", placement: Placement, *, row_elements: int) -> dict[str, Any] | None:
    """The configuration to hand to transformers; None where DeepSpeed has no part.

    Args:
        row_elements: elements of the largest parameter that must stay whole on every process: the rows of new tokens,
            which are read outside the forward of the module that owns them.
    """
    if not placement.uses_deepspeed:
        return None
    if recipe.distributed.deepspeed_config is not None:
        config: dict[str, Any] = json.loads(Path(recipe.distributed.deepspeed_config).read_text(encoding="utf-8"))
    else:
        config = _own_config(recipe, placement)
    if placement.strategy == "zero3":
        zero = config["zero_optimization"]
        threshold = zero.get("stage3_param_persistence_threshold", "auto")
        # DeepSpeed's own default; `auto` would make it depend on the hidden size.
        floor = 100_000 if threshold == "auto" else int(threshold)
        zero["stage3_param_persistence_threshold"] = max(floor, row_elements)
    return config


def _own_config(recipe: "Recipe", placement: Placement) -> dict[str, Any]:
    on_gpu = placement.gpus > 0
    zero: dict[str, Any] = {
        "stage": 3 if placement.strategy == "zero3" else 2,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if placement.strategy == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    config: dict[str, Any] = {
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "fp16": {"enabled": recipe.model.dtype == "float16"},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if recipe.distributed.offload != "none":
        place = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_optimizer"] = place
        if recipe.distributed.offload == "all":
            zero["offload_param"] = place
        # Offloaded states want DeepSpeed's own CPU Adam, which it builds from this block.
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        }
    return config
