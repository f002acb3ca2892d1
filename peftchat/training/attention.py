"""Which attention a run uses, and how batches are laid out for it."""

from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from peftchat.dataset.collator import BatchLayout
from peftchat.errors import UserError
from peftchat.models import per_dialogue
from peftchat.models.load import PER_DIALOGUE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftchat.recipe import Recipe

# What torch's variable-length kernel computes in.
_KERNEL_DTYPES = ("bfloat16", "float16")


def settle_attention(recipe: "Recipe", model: "PreTrainedModel | PeftModel", base: "PreTrainedModel") -> BatchLayout:
    """Give the model the attention of the recipe, and say how batches have to lie for it.

    Args:
        model: as it will be trained.
        base: the causal language model inside it.

    Raises:
        InputError: the recipe asks for an attention that the model cannot run.
    """
    wanted = recipe.model.attention
    before_rows = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    possible = not before_rows and _takes_other_attention(base)
    if wanted == PER_DIALOGUE and not possible:
        raise UserError(
            "this model cannot compute the attention of each dialogue by itself",
            where=f"model.attention: {wanted}",
            cure="Set it to `auto`.",
        )
    if wanted == PER_DIALOGUE or (wanted == "auto" and possible and _has_kernel(recipe)):
        per_dialogue.register(recipe.data.max_length)
        base.set_attn_implementation(PER_DIALOGUE)
    return _layout(recipe, base, before_rows=before_rows)


def fall_back(recipe: "Recipe", base: "PreTrainedModel") -> BatchLayout | None:
    """Give up attention by dialogue if `auto` had chosen it; the layout that batches need then, or None."""
    if recipe.model.attention != "auto" or base.config._attn_implementation != PER_DIALOGUE:
        return None
    base.set_attn_implementation("sdpa")
    return _layout(recipe, base, before_rows=False)


def _layout(recipe: "Recipe", base: "PreTrainedModel", *, before_rows: bool) -> BatchLayout:
    attention = str(base.config._attn_implementation)
    # Attention between borders never looks across one; the others compute what their mask throws away.
    if not before_rows and (attention == PER_DIALOGUE or "flash" in attention):
        return "flat"
    return "stacked" if recipe.data.packing else "padded"


def _takes_other_attention(base: "PreTrainedModel") -> bool:
    return base.config._attn_implementation == "sdpa" and base._can_set_attn_implementation()


def _has_kernel(recipe: "Recipe") -> bool:
    if torch.cuda.is_available():
        return recipe.model.dtype in _KERNEL_DTYPES
    return True
