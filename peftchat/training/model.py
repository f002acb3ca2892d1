"""Which attention a run uses, and how batches are laid out for it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.dataset.collator import BatchLayout, ChatCollator
from peftchat.errors import UserError
from peftchat.formatting import format_duration
from peftchat.models import varlen_attention as per_dialogue
from peftchat.models.added_tokens import EmbeddingSnapshot, attach_added_tokens, resize_embeddings, snapshot_embeddings
from peftchat.models.compiled import compile_layers, missing_compiler
from peftchat.models.loading import VARLEN, end_ids, load_base
from peftchat.models.peft_model import add_adapter, cast_trainable, freeze_layers
from peftchat.models.source import ModelSource
from peftchat.models.zero import is_zero3
from peftchat.runs.run_summary import AutoSetting
from peftchat.training.distributed import DistributedSetup, weight_dtype
from peftchat.training.throughput import count_parameters

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore
    from peftchat.dataset.encode import EncodingStats
    from peftchat.recipe import LoadedRecipe, Recipe


# What torch's variable-length kernel computes in.
_KERNEL_DTYPES = ("bfloat16", "float16")


def select_attention(recipe: "Recipe", model: "PreTrainedModel | PeftModel", base: "PreTrainedModel") -> BatchLayout:
    """Give the model the attention of the recipe, and say how batches have to lie for it.

    Args:
        model: as it will be trained.
        base: the causal language model inside it.

    Raises:
        UserError: the recipe asks for an attention that the model cannot run.
    """
    wanted = recipe.model.attention
    before_rows = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    possible = not before_rows and _takes_other_attention(base)
    if wanted == VARLEN and not possible:
        raise UserError(
            "this model cannot compute the attention of each conversation by itself",
            where=f"model.attention: {wanted}",
            hint="Set it to `auto`.",
        )
    if wanted == VARLEN or (wanted == "auto" and possible and _has_kernel(recipe)):
        per_dialogue.register(recipe.data.max_length)
        base.set_attn_implementation(VARLEN)
    return _layout(recipe, base, before_rows=before_rows)


def fall_back(recipe: "Recipe", base: "PreTrainedModel") -> BatchLayout | None:
    """Give up attention by conversation if `auto` had chosen it; the layout that batches need then, or None."""
    if recipe.model.attention != "auto" or base.config._attn_implementation != VARLEN:
        return None
    base.set_attn_implementation("sdpa")
    return _layout(recipe, base, before_rows=False)


def _layout(recipe: "Recipe", base: "PreTrainedModel", *, before_rows: bool) -> BatchLayout:
    attention = str(base.config._attn_implementation)
    # Attention between borders never looks across one; the others compute what their mask throws away.
    if not before_rows and (attention == VARLEN or "flash" in attention):
        return "flat"
    return "stacked" if recipe.data.packing else "padded"


def _takes_other_attention(base: "PreTrainedModel") -> bool:
    return base.config._attn_implementation == "sdpa" and base._can_set_attn_implementation()


def _has_kernel(recipe: "Recipe") -> bool:
    if torch.cuda.is_available():
        return recipe.model.dtype in _KERNEL_DTYPES
    return True


_WORTH_IT = 150.0
"""Seconds of steps from which on compiling (about 20 seconds the first time, 5 later) is won back."""

_QUICK_CORE = 2e11
"""Floating-point operations a second of a core that is quick at training. It is not measured: processes must agree."""


def compile_if_faster(
    loaded: "LoadedRecipe",
    placement: "DistributedSetup",
    built: "TrainableModel",
    stats: "EncodingStats",
    *,
    plain: bool,
) -> AutoSetting | None:
    """Compile the model's layers where the recipe says so, or leaves it open and the run is long.

    Args:
        stats: of the training rows.
        plain: whether every adapted layer is of the kind that is known to compile.

    Returns:
        What was chosen and why; None where nothing was.

    Raises:
        UserError: the recipe wants compiled layers and cannot have them.
    """
    wanted = loaded.recipe.training.torch_compile
    if wanted is False:
        return None
    lacking = missing_compiler(placement.device)
    if wanted:
        where = f"{loaded.where('training', 'torch_compile')}: true"
        if lacking:
            raise UserError(f"torch needs {lacking} to compile", where=where, hint="Install it, or remove the key.")
        if placement.uses_deepspeed:
            why = f"under `{placement.strategy}` layers are never compiled"
            raise UserError(why, where=where, hint="Remove the key, or write `distributed.strategy: ddp`.")
        if not compile_layers(built.causal_model):
            raise UserError("this model's layers cannot be told apart", where=where, hint="Remove the key.")
        return None
    # Elsewhere it was never measured.
    if lacking or not plain or placement.gpus or placement.uses_deepspeed:
        return None
    seconds = _seconds_at_least(loaded.recipe, placement, built, stats)
    if seconds < _WORTH_IT or not compile_layers(built.causal_model):
        return None
    return AutoSetting("training.torch_compile", "true", f"the steps take at least {format_duration(seconds)}")


def _seconds_at_least(
    recipe: "Recipe", placement: "DistributedSetup", built: "TrainableModel", stats: "EncodingStats"
) -> float:
    """How long the steps take on quick cores."""
    training = recipe.training
    tokens = stats.tokens * training.num_train_epochs
    if training.max_steps > 0:
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * placement.world_size
        longest = recipe.data.max_length if recipe.data.packing else stats.tokens / stats.rows
        tokens = training.max_steps * rows * longest
    if training.max_tokens is not None:
        tokens = min(tokens, training.max_tokens)
    each = 4 if isinstance(built.model, PeftModel) else 6
    work = each * count_parameters(built.causal_model) * tokens
    seconds = work / (_QUICK_CORE * (os.cpu_count() or 1))
    return min(seconds, training.max_minutes * 60) if training.max_minutes is not None else seconds


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """A model to train.

    Attributes:
        model: wrapped by PEFT on adapter paths.
        first_rows: the new tokens' embeddings before training; None without new tokens.
    """

    model: "PreTrainedModel | PeftModel"
    first_rows: EmbeddingSnapshot | None

    @property
    def causal_model(self) -> PreTrainedModel:
        """The language model inside any PEFT wrapper."""
        model: PreTrainedModel = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model


def chat_format(recipe: "Recipe") -> ChatFormat:
    """The recipe's tokenizer in the recipe's chat format."""
    return make_format(recipe.chat.template, recipe.chat.system, ModelSource.of_recipe(recipe).tokenizer())


def build_model(
    recipe: "Recipe",
    placement: DistributedSetup,
    chat: ChatFormat,
    rows: "ExampleStore",
    checkpoint: Path | None = None,
) -> TrainableModel:
    """Load the base and prepare it for the recipe's method.

    Under ZeRO-3 the process group must exist and transformers must know the configuration, or every process loads
    the whole model.

    Args:
        recipe: says what to load and what to train.
        placement: where it is trained.
        chat: its new tokens get rows.
        rows: the training rows, for variants that begin at what they find in them.
        checkpoint: the checkpoint that the run goes on from.

    Raises:
        UserError: the model cannot be loaded or does not fit the method.
    """
    set_seed(recipe.training.seed)
    dtype = weight_dtype(recipe.method, recipe.model.dtype, placement.strategy)
    model = load_base(recipe, dtype=dtype, device_map=_device_map(recipe, placement))
    if model.get_output_embeddings() is None:
        raise UserError("the model has no language-model head", where=f"model.name: {recipe.model.name}")
    _set_special_ids(model, chat)
    how = recipe.chat.new_token_init
    if recipe.method == "full":
        resize_embeddings(model, chat.tokenizer, chat.new_tokens, how)
        freeze_layers(model, recipe.model.freeze_layers)
        return TrainableModel(model, snapshot_embeddings(model, chat.new_tokens))
    model.requires_grad_(False)
    attach_added_tokens(model, chat.tokenizer, chat.new_tokens, how)
    wrapped = add_adapter(recipe, model, partial(_batches, recipe, chat, rows, model.device), checkpoint)
    _check_anything_trains(wrapped)
    if is_zero3() and recipe.method == "lora":
        # ZeRO-3 gathers parameters of one dtype at a time: https://github.com/deepspeedai/DeepSpeed/issues/8072
        # Its optimizer keeps a float32 master of every one of them.
        cast_trainable(wrapped, getattr(torch, recipe.model.dtype))
    return TrainableModel(wrapped, snapshot_embeddings(model, chat.new_tokens))


def _check_anything_trains(model: "PreTrainedModel | PeftModel") -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "the chat format adds no tokens to this tokenizer, so `trainable_tokens` has nothing to train",
            where="adapter.variant",
            hint="Take another variant, or a `chat.template` that adds tokens.",
        )


def _batches(
    recipe: "Recipe", chat: ChatFormat, rows: "ExampleStore", device: torch.device, count: int
) -> Iterator[dict[str, Any]]:
    """Up to `count` training rows, one a batch: the same in every process."""
    collator = ChatCollator(
        rows, loss_on=recipe.chat.loss_on, layout="padded", pad_token_id=int(chat.tokenizer.pad_token_id)
    )
    for index in range(min(count, len(rows))):
        yield {name: tensor.to(device) for name, tensor in collator.collate([[rows[index]]]).items()}


def _device_map(recipe: "Recipe", placement: DistributedSetup) -> dict[str, Any] | None:
    # Quantizing happens where the weights are put, so they go straight to this process's GPU.
    if recipe.quantization is None or not placement.gpus or placement.strategy == "zero3":
        return None
    return {"": int(os.environ.get("LOCAL_RANK", "0"))}


def _set_special_ids(model: PreTrainedModel, chat: ChatFormat) -> None:
    """Make generation stop at the end of a turn, and at the base's own end of text."""
    end = int(chat.tokenizer.convert_tokens_to_ids(chat.template.end_token))
    generation = model.generation_config
    others = (token_id for token_id in end_ids(generation.eos_token_id) if token_id != end)
    generation.eos_token_id = [end, *others]
    generation.pad_token_id = chat.tokenizer.pad_token_id
    model.config.get_text_config().eos_token_id = end
    model.config.get_text_config().pad_token_id = chat.tokenizer.pad_token_id
