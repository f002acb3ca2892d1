"""The PEFT config of a recipe's adapter."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig

    from peftchat.recipe import Recipe

_LORA_FLAVOURS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
"""LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023) and DoRA (Liu et al., 2024) by PEFT's own switches."""


def peft_config(recipe: "Recipe") -> "PeftConfig":
    """The stock PEFT config for the recipe's `adapter` section."""
    from peft import LoraConfig, TaskType

    adapter = recipe.adapter
    assert adapter is not None
    modules = adapter.target_modules
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        **_LORA_FLAVOURS[adapter.variant],
    )
