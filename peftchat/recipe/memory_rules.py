"""Where full fine-tuning with little memory has no effect, and what it excludes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peftchat.recipe.document import Keys
    from peftchat.recipe.schema import Recipe

MASTER_WEIGHTS: "Keys" = ("training", "master_weights")
IN_BACKWARD: "Keys" = ("training", "optimizer_in_backward")


def memory_conflicts(recipe: "Recipe") -> "Iterator[tuple[Keys, Keys, str]]":
    """Yield the keys without effect, the key that is the reason, and the reason in words."""
    training = recipe.training
    if training.master_weights == "bfloat16":
        yield from _of_bfloat16(recipe)
    if training.optimizer_in_backward:
        yield from _of_backward(recipe)


def _of_bfloat16(recipe: "Recipe") -> "Iterator[tuple[Keys, Keys, str]]":
    if recipe.method != "full":
        yield MASTER_WEIGHTS, ("method",), "an adapter's weights are few, and stay in float32"
    if recipe.distributed.strategy in ("zero2", "zero3"):
        yield MASTER_WEIGHTS, ("distributed", "strategy"), "DeepSpeed keeps float32 weights, and shards them"
    elif recipe.distributed.strategy == "ddp":
        yield MASTER_WEIGHTS, ("distributed", "strategy"), "DDP would add up gradients in bfloat16"
    if recipe.model.dtype != "bfloat16":
        why = f"the model is saved in {recipe.model.dtype}, which has more digits than bfloat16"
        yield MASTER_WEIGHTS, ("model", "dtype"), why
    if recipe.training.torch_compile:
        yield ("training", "torch_compile"), MASTER_WEIGHTS, "layers with weights in bfloat16 are not compiled"


def _of_backward(recipe: "Recipe") -> "Iterator[tuple[Keys, Keys, str]]":
    training, distributed = recipe.training, recipe.distributed
    if recipe.method != "full":
        yield IN_BACKWARD, ("method",), "an adapter's gradients are small beside the base"
    if distributed.strategy in ("zero2", "zero3"):
        yield IN_BACKWARD, ("distributed", "strategy"), "DeepSpeed updates the weights by itself"
    elif distributed.strategy == "ddp":
        yield IN_BACKWARD, ("distributed", "strategy"), "the processes average their gradients behind the backward pass"
    for key in ("processes", "nodes"):
        if getattr(distributed, key) not in (None, 1):
            why = "several processes average their gradients behind the backward pass"
            yield IN_BACKWARD, ("distributed", key), why
    if recipe.model.dtype == "float16":
        yield IN_BACKWARD, ("model", "dtype"), "float16's loss scaling looks at all gradients before an update"
    if training.max_grad_norm:
        why = "a gradient is used and freed before the norm of all of them is known"
        yield ("training", "max_grad_norm"), IN_BACKWARD, why
    if training.gradient_accumulation_steps != 1:
        why = "a gradient is used and freed, and cannot be added to the next one"
        yield ("training", "gradient_accumulation_steps"), IN_BACKWARD, why
    if training.global_batch_size is not None:
        why = "it may take several forward passes, whose gradients cannot be added up"
        yield ("training", "global_batch_size"), IN_BACKWARD, why
    if training.on_spike == "skip":
        yield ("training", "on_spike"), IN_BACKWARD, "weights are updated before the step is judged"
    if training.on_oom == "halve":
        yield ("training", "on_oom"), IN_BACKWARD, "some weights are updated already where memory runs out"
    if training.torch_compile:
        why = "layers whose weights change in the backward pass are not compiled"
        yield ("training", "torch_compile"), IN_BACKWARD, why
