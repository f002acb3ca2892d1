"""Stock PEFT adapter files: written with the new tokens' rows in PEFT's own format, checked, and read back.

Loading such a folder with `PeftModel.from_pretrained` on the base gives the trained model; where the new ids lie
beyond the base's vocabulary it must first be grown with `resize_token_embeddings`.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftchat.errors import CheckFailed
from peftchat.models.rows import TokenRows, rows_of
from peftchat.models.zero import full_tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS_KEY = ".token_adapter.trainable_tokens_delta"


def adapter_state(model: "PeftModel") -> dict[str, Tensor]:
    """Every trained tensor of the adapter by the name that PEFT saves it under, on the CPU.

    Every process must call it; under ZeRO the values are those of the optimizer's float32 masters.
    """
    from peft import get_peft_model_state_dict

    trained = {name: full_tensor(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    # PEFT would add the whole embedding if it believed that the vocabulary had been resized.
    state: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    rows = rows_of(model)
    if rows is not None:
        base = model.get_base_model()
        for name, tensor in _row_tensors(base, rows).items():
            state[f"{_PREFIX}{name}{_ROWS_KEY}"] = full_tensor(tensor)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def save_adapter(model: "PeftModel", state: dict[str, Tensor], folder: Path) -> None:
    """Write `adapter_config.json` and the weights, then open the file again and compare.

    Args:
        model: the wrapped model; its config is written, extended by the rows' ids.
        state: what `adapter_state` returned.
        folder: an existing folder.

    Raises:
        CheckFailed: what is on disk is not what was in memory.
    """
    config = copy.copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    rows = rows_of(model)
    if rows is not None:
        base = model.get_base_model()
        ids = rows.ids.tolist()
        config.trainable_token_indices = {_short_name(base, name): ids for name in _row_tensors(base, rows)}
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    check_adapter_file(folder / WEIGHTS, state)


def check_adapter_file(path: Path, expected: dict[str, Tensor]) -> None:
    """Compare a file with the tensors it should hold: names, shapes, values.

    An adapter of empty tensors is what several tools leave behind under ZeRO-3, so none may be empty.

    Raises:
        CheckFailed: naming the first tensor that differs.
    """
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        if names != set(expected):
            odd = sorted(names ^ set(expected))[0]
            raise CheckFailed(f"{path}: the tensor {odd} is in memory or in the file, but not in both")
        for name, tensor in expected.items():
            stored = file.get_tensor(name)
            if stored.numel() == 0:
                raise CheckFailed(f"{path}: the tensor {name} is empty")
            if stored.shape != tensor.shape or not torch.equal(stored, tensor):
                raise CheckFailed(f"{path}: the tensor {name} was not written as it was trained")
            if not torch.isfinite(stored).all():
                raise CheckFailed(f"{path}: the tensor {name} holds values that are not finite; training diverged")


def load_adapter_state(model: "PeftModel", path: Path) -> None:
    """Put the tensors of a saved adapter back into a model that was built the same way.

    Raises:
        CheckFailed: the file's tensors are not those of the model.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(str(path))
    rows = rows_of(model)
    if rows is not None:
        base = model.get_base_model()
        for name, parameter in _row_tensors(base, rows).items():
            stored = state.pop(f"{_PREFIX}{name}{_ROWS_KEY}", None)
            if stored is None or stored.shape != parameter.shape:
                raise CheckFailed(f"{path}: the rows of the new tokens for {name} are missing or of another shape")
            with torch.no_grad():
                parameter.copy_(stored)
    result = set_peft_model_state_dict(model, state)
    if result.unexpected_keys:
        raise CheckFailed(f"{path}: the model has no place for the tensor {result.unexpected_keys[0]}")


def _row_tensors(base: "PreTrainedModel", rows: TokenRows) -> dict[str, torch.nn.Parameter]:
    """The rows by the name of the layer they belong to; one entry where the head is tied."""
    tensors = {_module_name(base, base.get_input_embeddings()): rows.input_rows}
    if rows.output_rows is not None:
        tensors[_module_name(base, base.get_output_embeddings())] = rows.output_rows
    return tensors


def _module_name(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _short_name(model: torch.nn.Module, name: str) -> str:
    """The shortest ending of a module's name that no other module shares: what PEFT matches by."""
    names = [other for other, _ in model.named_modules() if other]
    parts = name.split(".")
    for count in range(1, len(parts)):
        ending = ".".join(parts[-count:])
        if sum(other.endswith(ending) for other in names) == 1:
            return ending
    return name
