"""The model of a run, ready to train: loaded, wrapped, its new tokens given rows."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from peftchat.chat_template.registry import ChatFormat, make_format
from peftchat.dataset.collator import ChatCollator
from peftchat.errors import UserError
from peftchat.models.adapters import hold_trained_in, wrap
from peftchat.models.ends import end_ids
from peftchat.models.freezing import freeze_layers
from peftchat.models.load import load_base, load_tokenizer
from peftchat.models.new_tokens import InitialRows, add_rows_to_frozen, current_rows, grow_and_fill
from peftchat.models.zero import is_zero3
from peftchat.training.placement import Placement, held_dtype

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore
    from peftchat.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Built:
    """A model to train.

    Attributes:
        model: wrapped by PEFT on adapter paths.
        first_rows: the new tokens' embeddings before training; None without new tokens.
    """

    model: "PreTrainedModel | PeftModel"
    first_rows: InitialRows | None

    @property
    def causal_model(self) -> PreTrainedModel:
        """The language model inside any PEFT wrapper."""
        model: PreTrainedModel = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model


def chat_format(recipe: "Recipe") -> ChatFormat:
    """The recipe's tokenizer in the recipe's chat format."""
    return make_format(recipe.chat.template, recipe.chat.system, load_tokenizer(recipe))


def build_model(
    recipe: "Recipe", placement: Placement, chat: ChatFormat, rows: "ExampleStore", checkpoint: Path | None = None
) -> Built:
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
        InputError: the model cannot be loaded or does not fit the method.
    """
    set_seed(recipe.training.seed)
    dtype = held_dtype(recipe.method, recipe.model.dtype, placement.strategy)
    model = load_base(recipe, dtype=dtype, device_map=_device_map(recipe, placement))
    if model.get_output_embeddings() is None:
        raise UserError("the model has no language-model head", where=f"model.name: {recipe.model.name}")
    _set_special_ids(model, chat)
    how = recipe.chat.new_token_init
    if recipe.method == "full":
        grow_and_fill(model, chat.tokenizer, chat.new_tokens, how)
        freeze_layers(model, recipe.model.freeze_layers)
        return Built(model, current_rows(model, chat.new_tokens))
    model.requires_grad_(False)
    add_rows_to_frozen(model, chat.tokenizer, chat.new_tokens, how)
    wrapped = wrap(recipe, model, partial(_batches, recipe, chat, rows, model.device), checkpoint)
    _check_anything_trains(wrapped)
    if is_zero3() and recipe.method == "lora":
        # ZeRO-3 gathers parameters of one dtype at a time: https://github.com/deepspeedai/DeepSpeed/issues/8072
        # Its optimizer keeps a float32 master of every one of them.
        hold_trained_in(wrapped, getattr(torch, recipe.model.dtype))
    return Built(wrapped, current_rows(model, chat.new_tokens))


def _check_anything_trains(model: "PreTrainedModel | PeftModel") -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "the chat format adds no tokens to this tokenizer, so `trainable_tokens` has nothing to train",
            where="adapter.variant",
            cure="Take another variant, or a `chat.template` that adds tokens.",
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


def _device_map(recipe: "Recipe", placement: Placement) -> dict[str, Any] | None:
    # Quantising happens where the weights are put, so they go straight to this process's GPU.
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
