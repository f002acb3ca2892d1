"""Loading a recipe's base model: dtype, quantization and attention."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from peftchat.models.base_check import check_stored_values, check_values
from peftchat.models.read_weights import layers_not_quantized
from peftchat.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftchat.recipe import Recipe

VARLEN = "varlen"
"""The attention of `peftchat.models.varlen_attention`, by the name it has in recipes and in transformers' registry."""


def keep_4bit_weights_as_quantized(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU at the first forward without gradients.

    The repacked layout rounds the scales to bfloat16, so an evaluation would change the base under the adapter. It also
    asserts that every layer's width is a multiple of 32. bitsandbytes 0.50, `Linear4bit.forward`.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def end_ids(eos_token_id: int | Iterable[int] | None) -> list[int]:
    """Return the ids that end an answer as a list, whatever transformers stores: none, one or several."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def load_base(recipe: "Recipe", *, dtype: str, device_map: dict[str, Any] | None = None) -> "PreTrainedModel":
    """Load a recipe's base model, quantized if the recipe says so.

    Args:
        recipe: names the model.
        dtype: torch's name of the dtype of unquantized weights.
        device_map: where quantized weights are put while they are loaded; None for the CPU.

    Raises:
        UserError: the model cannot be loaded, or does not support the attention in the recipe.
    """
    import torch

    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    attention = attention_implementation(recipe)
    if attention is not None:
        arguments["attn_implementation"] = attention
    source = ModelSource.of_recipe(recipe)
    if recipe.quantization is not None:
        arguments["quantization_config"] = quantization_config(recipe, layers_not_quantized(source.config()))
    if device_map is not None:
        arguments["device_map"] = device_map
    model = source.load_model(**arguments)
    check_values(model, source)
    if recipe.quantization is not None:
        check_stored_values(source)
        keep_4bit_weights_as_quantized(model)
    return model


def quantization_config(recipe: "Recipe", left_out: list[str] | None = None) -> Any:
    """Return the recipe's quantization for bitsandbytes (Dettmers et al., 2023).

    Args:
        recipe: its `quantization`.
        left_out: the layers that stay as they are; None for the LM head alone.
    """
    import torch
    from transformers import BitsAndBytesConfig

    section = recipe.quantization
    assert section is not None
    if section.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=left_out,  # Of 4 bits too, in spite of its name.
        bnb_4bit_quant_type=section.type,
        bnb_4bit_use_double_quant=section.double,
        bnb_4bit_compute_dtype=getattr(torch, recipe.model.computed_in),
        # ZeRO-3 partitions parameters of one dtype only, so the packed 4-bit values are stored as their dtype.
        # https://huggingface.co/docs/peft/accelerate/deepspeed
        bnb_4bit_quant_storage=getattr(torch, recipe.model.dtype),
    )


def attention_implementation(recipe: "Recipe") -> str | None:
    """Return the attention to request from transformers; None for its default (SDPA where the model has it)."""
    import importlib.util

    import torch

    if recipe.model.attention == VARLEN:
        # It replaces SDPA once the model is loaded.
        return None
    if recipe.model.attention != "auto":
        return recipe.model.attention
    half = recipe.model.computed_in != "float32"
    if torch.cuda.is_available() and half and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return None


def has_bfloat16_kernels() -> bool:
    """Return whether oneDNN multiplies bfloat16 matrices on this CPU.

    Without AVX-512 it does not, and torch's own kernels take many times as long as those for float32.
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_in_float32_if_faster(model: nn.Module) -> None:
    """Turn a bfloat16 model on a CPU into float32, if the CPU has no kernels for bfloat16 and memory suffices.

    A quantized model stays as it is.
    """
    import psutil
    import torch

    parameters = list(model.parameters())
    in_bfloat16 = [one for one in parameters if one.dtype == torch.bfloat16]
    is_quantized = getattr(model, "is_quantized", False) or any(one.dtype == torch.uint8 for one in parameters)
    if not in_bfloat16 or is_quantized or any(one.device.type != "cpu" for one in parameters):
        return
    needed = 4 * sum(one.numel() for one in in_bfloat16)
    if not has_bfloat16_kernels() and needed < psutil.virtual_memory().available / 2:
        model.float()
