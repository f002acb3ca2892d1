"""Writing a trained model into a folder that stock libraries load."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from peftchat.errors import VerificationError
from peftchat.models.adapter_files import adapter_state, is_adapted, save_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model_files(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    dtype: str | None,
    is_main: bool,
    wrapped: Any = None,
) -> None:
    """Write the adapter or the full weights, and the tokenizer, and check what was written.

    Every process must call it; the main one writes.

    Args:
        dtype: torch's name of the dtype for full weights; None keeps the one they have. Adapters stay as trained.
        wrapped: DeepSpeed's engine, where it holds the weights.
    """
    if is_adapted(model):
        state = adapter_state(model)
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(model, state, folder)
            tokenizer.save_pretrained(str(folder))
        return
    full = _full_state(model, wrapped, dtype, is_main=is_main)
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        before = model.config.dtype
        if dtype is not None:
            model.config.dtype = getattr(torch, dtype)
        model.save_pretrained(str(folder), state_dict=full)
        model.config.dtype = before
        _check_shapes(folder, full)
        tokenizer.save_pretrained(str(folder))


def _full_state(model: "PreTrainedModel", wrapped: Any, dtype: str | None, *, is_main: bool) -> dict[str, Tensor]:
    """Every weight on the CPU of the main process."""
    if wrapped is not None and wrapped.zero_optimization_partition_weights():
        state = wrapped._zero3_consolidated_16bit_state_dict()
    else:
        state = model.state_dict() if is_main else {}
    if not is_main:
        return {}
    target = None if dtype is None else getattr(torch, dtype)
    return {
        name: tensor.detach().to("cpu", dtype=target if tensor.is_floating_point() else None)
        for name, tensor in state.items()
    }


def _check_shapes(folder: Path, expected: dict[str, Tensor]) -> None:
    """Open what was written: every weight there, none empty.

    Raises:
        CheckFailed: naming the first weight that is not as it should be.
    """
    stored: dict[str, list[int]] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(str(file), framework="pt") as shard:
            stored |= {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    tied = {tensor.data_ptr() for name, tensor in expected.items() if name in stored}
    for name, tensor in expected.items():
        if name not in stored and tensor.data_ptr() not in tied:
            raise VerificationError(f"{folder}: the weight {name} was not written")
        if name in stored and (stored[name] != list(tensor.shape) or 0 in stored[name]):
            raise VerificationError(f"{folder}: the weight {name} was written with the shape {stored[name]}")
