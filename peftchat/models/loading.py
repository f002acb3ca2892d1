"""Corrections of libraries, each as narrow as it can be, each with what forced it.

The tests hold a case for each that fails once the library no longer needs it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftchat.recipe import Recipe


def keep_4bit_weights_as_quantized(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU at the first forward without gradients.

    The packed form rounds the scales to bfloat16, so that an evaluation would change the base under the adapter, and
    it asserts that every layer's width is a multiple of 32. bitsandbytes 0.50, `Linear4bit.forward`.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def end_ids(eos_token_id: int | Iterable[int] | None) -> list[int]:
    """The ids that end an answer, from what transformers keeps: none, one or several."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


VARLEN = "varlen"
"""The attention of `peftchat.models.varlen_attention`, by the name it has in recipes and in transformers' registry."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_model_folder(name: str) -> None:
    """Refuse a local folder that cannot hold the model, before anything heavy is imported.

    Raises:
        UserError: the folder has no config, no weights, or weights only in pickled form.
    """
    folder = Path(name)
    if not _is_folder(name):
        return
    if not (folder / "config.json").is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "This is an adapter: name its base here, or merge it first with `peftchat merge`."
        raise UserError("the folder has no config.json", where=f"model.name: {name}", hint=hint or None)
    if any((folder / file).is_file() for file in _WEIGHTS):
        _check_index(folder)
        return
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled is not None:
        raise UserError(
            f"the weights are pickled ({pickled.name}), and unpickling runs whatever the file says",
            where=f"model.name: {name}",
            hint="Save them as safetensors first: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`.",
        )
    raise UserError(
        "the model folder holds no weights (model.safetensors or its index)",
        where=f"model.name: {name}",
        hint="Download the whole model, or check the path.",
    )


def _is_folder(name: str) -> bool:
    """Whether a model's name means a folder; False for a hub id.

    Raises:
        UserError: it is the path of a file, or of nothing.
    """
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError("there is no such folder", where=f"model.name: {name}", hint="Check the path.")
        return False
    if not folder.is_dir():
        raise UserError("a model is a folder, and this is a file", where=f"model.name: {name}")
    return True


def _check_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} weight files are missing, the first is {missing[0]}",
            where=f"model.name: {folder}",
            hint="Download the model again.",
        )


def load_config(recipe: "Recipe", *, need_weights: bool = True) -> "PretrainedConfig":
    """The base model's config.

    Args:
        need_weights: whether a folder without weights is refused.

    Raises:
        UserError: it cannot be read, or is not that of a causal language model.
    """
    from transformers import AutoConfig

    if need_weights:
        check_model_folder(recipe.model.name)
    try:
        return AutoConfig.from_pretrained(recipe.model.name, **_hub_arguments(recipe))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(recipe, "the model's config", error) from error


def load_tokenizer(recipe: "Recipe") -> "PreTrainedTokenizerBase":
    """The base model's tokenizer, as it is; the weights need not be there.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    _is_folder(recipe.model.name)
    try:
        return AutoTokenizer.from_pretrained(recipe.model.name, **_hub_arguments(recipe))
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise _unreadable(recipe, "the tokenizer", error) from error


def load_base(recipe: "Recipe", *, dtype: str, device_map: dict[str, Any] | None = None) -> "PreTrainedModel":
    """The base model, quantized if the recipe says so.

    Args:
        recipe: names the model.
        dtype: torch's name of the dtype in which unquantized weights are held.
        device_map: where quantized weights are put while they are loaded; None for the CPU.

    Raises:
        UserError: the model cannot be loaded, or cannot run the attention asked for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_model_folder(recipe.model.name)
    arguments: dict[str, Any] = {**_hub_arguments(recipe), "dtype": getattr(torch, dtype), "use_safetensors": True}
    attention = attention_implementation(recipe)
    if attention is not None:
        arguments["attn_implementation"] = attention
    if recipe.quantization is not None:
        arguments["quantization_config"] = quantization_config(recipe)
    if device_map is not None:
        arguments["device_map"] = device_map
    try:
        model = AutoModelForCausalLM.from_pretrained(recipe.model.name, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(recipe, "the model", error) from error
    if recipe.quantization is not None:
        keep_4bit_weights_as_quantized(model)
    return model


def quantization_config(recipe: "Recipe") -> Any:
    """The recipe's quantization for bitsandbytes (Dettmers et al., 2023)."""
    import torch
    from transformers import BitsAndBytesConfig

    wanted = recipe.quantization
    assert wanted is not None
    if wanted.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, recipe.model.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=wanted.type,
        bnb_4bit_use_double_quant=wanted.double,
        bnb_4bit_compute_dtype=dtype,
        # ZeRO-3 slices parameters of one dtype only, so the packed 4-bit values pretend to be of the compute dtype.
        # https://huggingface.co/docs/peft/accelerate/deepspeed
        bnb_4bit_quant_storage=dtype,
    )


def attention_implementation(recipe: "Recipe") -> str | None:
    """The attention to ask transformers for; None leaves the choice to it (SDPA wherever the model has it)."""
    import importlib.util

    import torch

    if recipe.model.attention == VARLEN:
        # Put in the place of SDPA once the model is there.
        return None
    if recipe.model.attention != "auto":
        return recipe.model.attention
    half = recipe.model.dtype != "float32"
    if torch.cuda.is_available() and half and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return None


def _hub_arguments(recipe: "Recipe") -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
    if recipe.model.revision is not None:
        arguments["revision"] = recipe.model.revision
    return arguments


def _unreadable(recipe: "Recipe", what: str, error: Exception) -> UserError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{what} cannot be loaded: {first_line}",
        where=f"model.name: {recipe.model.name}",
        hint=None
        if Path(recipe.model.name).exists()
        else "Check the name, the network and the login, or use a folder.",
    )
