"""The model of a run: base, added tokens and adapter, its attention, and compiled layers."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.dataset.collator import BatchLayout, ChatCollator
from peftchat.errors import UserError
from peftchat.models import varlen_attention
from peftchat.models.added_tokens import EmbeddingSnapshot, attach_added_tokens, resize_embeddings, snapshot_embeddings
from peftchat.models.base_config import carries_state
from peftchat.models.experts import expert_parameters
from peftchat.models.fused_lora import fuse_lora_forward, num_adapted_layers
from peftchat.models.loading import VARLEN, end_ids, load_base
from peftchat.models.peft_model import adapter_notes, add_adapter, cast_trainable, freeze_layers
from peftchat.models.savable import mend_generation_settings
from peftchat.models.source import GENERATION_CONFIG, ModelSource
from peftchat.models.widened import compute_in_float32
from peftchat.models.zero import is_zero3
from peftchat.training.compiling import compile_as_asked
from peftchat.training.context import TrainContext
from peftchat.training.distributed import DistributedSetup, weight_dtype
from peftchat.training.first_stage import load_first_stage, merge_first_stage
from peftchat.training.progress import memory_in_use
from peftchat.training.reference import trained_values
from peftchat.training.weightwise import uses_little_memory

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore
    from peftchat.recipe import Recipe


# The dtypes that torch's variable-length attention kernel supports.
_KERNEL_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """A model to train.

    Attributes:
        model: the model, wrapped by PEFT on adapter paths.
        initial_embeddings: the added tokens' embeddings before training; None without added tokens.
        baseline_bytes: memory that this process held before the model was loaded; 0 on a GPU.
        compilable: whether every layer is of a kind that is known to compile, and soon.
        start: the trained weights before training, for a reference that the adapter is a part of; None where it is
            the base.
    """

    model: "PreTrainedModel | PeftModel"
    initial_embeddings: EmbeddingSnapshot | None
    baseline_bytes: int = 0
    compilable: bool = False
    start: Mapping[str, Tensor] | None = None

    @property
    def causal_model(self) -> PreTrainedModel:
        """The language model inside any PEFT wrapper."""
        model: PreTrainedModel = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model


def load_trainable_model(context: TrainContext) -> TrainableModel:
    """Load the base, prepare it for the recipe's method, fuse its adapters, and compile its layers if that is asked.

    Under ZeRO-3 the process group must exist and transformers must know the configuration; otherwise every process
    loads the unsharded model.

    Raises:
        UserError: the model cannot be loaded, or does not fit the method.
    """
    recipe = context.recipe
    baseline = 0 if torch.cuda.is_available() else memory_in_use()
    built = _build_model(context)
    compilable = recipe.method == "full"
    if isinstance(built.model, PeftModel):
        compilable = 0 < fuse_lora_forward(built.model) == num_adapted_layers(built.model)
    # Compiling a layer with experts takes minutes.
    compilable = compilable and not expert_parameters(built.causal_model)
    compilable = compilable and not uses_little_memory(recipe)
    if recipe.training.torch_compile:
        compile_as_asked(context.loaded, context.distributed, built.causal_model)
    return replace(built, baseline_bytes=baseline, compilable=compilable)


def _build_model(context: TrainContext) -> TrainableModel:
    recipe, chat = context.recipe, context.chat
    set_seed(recipe.training.seed)
    master = recipe.training.master_weights
    dtype = weight_dtype(recipe.method, recipe.model.loaded_as, context.distributed.strategy, master)
    model = load_base(recipe, dtype=dtype, device_map=_device_map(recipe, context.distributed))
    if model.get_output_embeddings() is None:
        raise UserError("the model has no language-model head", where=f"model.name: {recipe.model.name}")
    source = ModelSource.of_recipe(recipe)
    if source.has(GENERATION_CONFIG):
        source.generation_config()  # transformers would pass over a file that it cannot read.
    _set_special_ids(model, chat)
    for note in mend_generation_settings(model.config, model.generation_config):
        context.notes.tell(note)
    init = recipe.chat.new_token_init
    first_stage = None if recipe.model.adapter is None else Path(recipe.model.adapter)
    if recipe.method == "full":
        resize_embeddings(model, chat.tokenizer, chat.new_tokens, init)
        if first_stage is not None and context.checkpoint is None:
            merge_first_stage(recipe, model, first_stage)
        freeze_layers(model, recipe.model.freeze_layers)
        if master == "bfloat16" and recipe.model.computed_in == "float32":
            compute_in_float32(model)
        return TrainableModel(model, snapshot_embeddings(model, chat.new_tokens))
    model.requires_grad_(False)
    attach_added_tokens(model, chat.tokenizer, chat.new_tokens, init)
    # Both hold the shapes that an initialization has found, and values in its place.
    checkpoint = context.checkpoint.path if context.checkpoint else first_stage
    for note in adapter_notes(recipe, model):
        context.notes.tell(note)
    batches = partial(_calibration_batches, recipe, chat, context.splits["train"].store, model.device)
    wrapped = add_adapter(recipe, model, batches, checkpoint)
    _check_has_trainable(wrapped)
    if first_stage is not None:
        load_first_stage(recipe, wrapped, first_stage)
    if is_zero3() and recipe.method == "lora":
        # ZeRO-3 gathers parameters of one dtype at a time: https://github.com/deepspeedai/DeepSpeed/issues/8072
        # Its optimizer keeps float32 master weights of all of them.
        cast_trainable(wrapped, getattr(torch, recipe.model.computed_in))
    start = trained_values(wrapped) if first_stage is not None and recipe.has_reference else None
    return TrainableModel(wrapped, snapshot_embeddings(model, chat.new_tokens), start=start)


def _check_has_trainable(model: "PreTrainedModel | PeftModel") -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "the chat format adds no tokens to this tokenizer, so `trainable_tokens` has nothing to train",
            where="adapter.variant",
            hint="Use another variant, or a `chat.template` that adds tokens.",
        )


def _calibration_batches(
    recipe: "Recipe", chat: ChatFormat, examples: "ExampleStore", device: torch.device, count: int
) -> Iterator[dict[str, Any]]:
    """Yield up to `count` training examples, one per batch: the same ones in every process."""
    collator = ChatCollator(
        examples, loss_on=recipe.chat.loss_policy, layout="padded", pad_token_id=int(chat.tokenizer.pad_token_id)
    )
    for index in range(min(count, len(examples))):
        yield {name: tensor.to(device) for name, tensor in collator.collate([[examples[index]]]).items()}


def _device_map(recipe: "Recipe", distributed: DistributedSetup) -> dict[str, Any] | None:
    # Weights are quantized on the device they are loaded to, so they go to this process's GPU at once.
    if recipe.quantization is None or not distributed.gpus or distributed.strategy == "zero3":
        return None
    return {"": int(os.environ.get("LOCAL_RANK", "0"))}


def _set_special_ids(model: PreTrainedModel, chat: ChatFormat) -> None:
    """Stop generation at the end of a turn, and at the base's own end of text."""
    ends = [int(chat.tokenizer.convert_tokens_to_ids(token)) for token in chat.template.end_tokens]
    generation = model.generation_config
    others = (token_id for token_id in end_ids(generation.eos_token_id) if token_id not in ends)
    generation.eos_token_id = [*ends, *others]
    generation.pad_token_id = chat.tokenizer.pad_token_id
    model.config.get_text_config().eos_token_id = ends[0]
    model.config.get_text_config().pad_token_id = chat.tokenizer.pad_token_id


def select_attention(recipe: "Recipe", model: "PreTrainedModel | PeftModel", base: "PreTrainedModel") -> BatchLayout:
    """Set the model's attention implementation, and return the batch layout that it needs.

    Args:
        recipe: its `model.attention` and `data.packing`.
        model: the model to train.
        base: the causal language model inside it.

    Raises:
        UserError: the model does not support the recipe's attention.
    """
    attention = recipe.model.attention
    has_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    supports_varlen = not has_prompt and base.config._attn_implementation == "sdpa"
    supports_varlen = supports_varlen and base._can_set_attn_implementation() and not carries_state(base.config)
    if attention == VARLEN and not supports_varlen:
        raise UserError(
            "this model does not support variable-length attention",
            where=f"model.attention: {attention}",
            hint="Set it to `auto`.",
        )
    if attention == VARLEN or (attention == "auto" and supports_varlen and _has_kernel(recipe)):
        varlen_attention.register(recipe.data.max_length)
        base.set_attn_implementation(VARLEN)
    return _layout(recipe, base, has_prompt=has_prompt)


def fall_back_to_sdpa(recipe: "Recipe", base: "PreTrainedModel") -> BatchLayout | None:
    """Replace variable-length attention if `auto` selected it; return the batch layout needed then, or None."""
    if recipe.model.attention != "auto" or base.config._attn_implementation != VARLEN:
        return None
    base.set_attn_implementation("sdpa")
    return _layout(recipe, base, has_prompt=False)


def _layout(recipe: "Recipe", base: "PreTrainedModel", *, has_prompt: bool) -> BatchLayout:
    attention = str(base.config._attn_implementation)
    # Variable-length attention computes nothing across conversations; the others compute what their mask discards.
    if not has_prompt and not carries_state(base.config) and (attention == VARLEN or "flash" in attention):
        return "varlen"
    return "packed" if recipe.data.packing else "padded"


def _has_kernel(recipe: "Recipe") -> bool:
    return not torch.cuda.is_available() or recipe.model.computed_in in _KERNEL_DTYPES
