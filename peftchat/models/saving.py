"""Stock PEFT adapter files: written, checked, and read back.

Loading such a folder with `PeftModel.from_pretrained` on the base gives the trained model; where the new ids lie
beyond the base's vocabulary it must first be grown with `resize_token_embeddings`. PEFT keeps the rows of new tokens
inside an adapter of the LoRA class. Beside any other they are an adapter of their own, in the folder `token_rows`,
which is loaded first and merged into the base.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, TrainableTokensConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftchat.errors import VerificationError
from peftchat.models.added_tokens import AddedTokenEmbeddings, find_added_tokens
from peftchat.models.lora_init import INIT_ADAPTER
from peftchat.models.zero import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Adapted: TypeAlias = PreTrainedModel | PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WEIGHTS = "adapter_model.safetensors"
TOKEN_ROWS = "token_rows"
"""The folder of the rows of new tokens, where they are an adapter of their own."""

_PREFIX = "base_model.model."
_INSIDE = ".token_adapter.trainable_tokens_delta"
_BESIDE = ".trainable_tokens_delta"

AdapterState = dict[str, dict[str, Tensor]]
"""Folder of an adapter within the run's (`""` for the run's own) -> its tensors by the names that PEFT gives them."""


def is_adapted(model: "Adapted") -> bool:
    """Whether something is trained beside a frozen model, rather than the model itself."""
    return isinstance(model, PeftModel) or find_added_tokens(model) is not None


def adapter_state(model: "Adapted") -> AdapterState:
    """Every trained tensor by the name that PEFT saves it under, on the CPU.

    Every process must call it; under ZeRO the values are those of the optimizer's float32 masters.
    """
    state: AdapterState = {}
    if isinstance(model, PeftModel):
        state[""] = _peft_state(model)
    rows = find_added_tokens(model)
    if rows is not None:
        folder, ending = _owner_of_embeddings(model)
        tensors = {name: full_tensor(tensor) for name, tensor in _embedding_tensors(_causal(model), rows).items()}
        if rows.tied and ending == _BESIDE:
            # There PEFT looks for them under the head's name as well.
            head = _module_name(_causal(model), _causal(model).get_output_embeddings())
            tensors[head] = next(iter(tensors.values())).clone()
        state.setdefault(folder, {}).update({f"{_PREFIX}{name}{ending}": held for name, held in tensors.items()})
    return {folder: {name: tensor.contiguous() for name, tensor in held.items()} for folder, held in state.items()}


def save_adapter(model: "Adapted", state: AdapterState, folder: Path) -> None:
    """Write each adapter's config and weights, then open the files again and compare.

    Args:
        model: its configs are written, extended by the rows' ids.
        state: what `adapter_state` returned.
        folder: an existing folder.

    Raises:
        VerificationError: what is on disk is not what was in memory.
    """
    for name, tensors in state.items():
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, str(folder / name / WEIGHTS), metadata={"format": "pt"})
        _config_for(model, name).save_pretrained(str(folder / name))
        check_adapter_file(folder / name / WEIGHTS, tensors)


def check_adapter_file(path: Path, expected: dict[str, Tensor]) -> None:
    """Compare a file with the tensors it should hold: names, shapes, values.

    An adapter of empty tensors is what several tools leave behind under ZeRO-3, so none may be empty.

    Raises:
        VerificationError: naming the first tensor that differs.
    """
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        if names != set(expected):
            odd = sorted(names ^ set(expected))[0]
            raise VerificationError(f"{path}: the tensor {odd} is in memory or in the file, but not in both")
        for name, tensor in expected.items():
            stored = file.get_tensor(name)
            if stored.numel() == 0:
                raise VerificationError(f"{path}: the tensor {name} is empty")
            if stored.shape != tensor.shape or not torch.equal(stored, tensor):
                raise VerificationError(f"{path}: the tensor {name} was not written as it was trained")
            if stored.is_floating_point() and not torch.isfinite(stored).all():
                raise VerificationError(
                    f"{path}: the tensor {name} holds values that are not finite; training diverged"
                )


def load_adapter_state(model: "Adapted", folder: Path) -> None:
    """Put the tensors of a saved adapter back into a model that was built the same way.

    Raises:
        VerificationError: the files' tensors are not those of the model.
    """
    from peft import set_peft_model_state_dict

    held = {name: load_file(str(folder / name / WEIGHTS)) for name in _folders(model)}
    rows = find_added_tokens(model)
    if rows is not None:
        home, ending = _owner_of_embeddings(model)
        for name, parameter in _embedding_tensors(_causal(model), rows).items():
            stored = held[home].pop(f"{_PREFIX}{name}{ending}", None)
            if stored is None or stored.shape != parameter.shape:
                raise VerificationError(
                    f"{folder}: the rows of the new tokens for {name} are missing or of another shape"
                )
            with torch.no_grad():
                parameter.copy_(stored)
    if not isinstance(model, PeftModel):
        return
    state = held[""]
    if INIT_ADAPTER in model.peft_config:
        state, start = _halves(state)
        set_peft_model_state_dict(model, start, adapter_name=INIT_ADAPTER)
    result = set_peft_model_state_dict(model, state)
    if result.unexpected_keys:
        raise VerificationError(f"{folder}: the model has no place for the tensor {result.unexpected_keys[0]}")


def _peft_state(model: PeftModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    trained = {
        id(parameter): full_tensor(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.endswith(".default")
    }
    # Some methods keep indices and fixed projections in buffers, and share parameters under several names.
    whole = {
        name: trained.get(id(tensor), tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in trained or not isinstance(tensor, torch.nn.Parameter)
    }
    with _whole_ranks(model):
        # PEFT would add the whole embedding if it believed that the vocabulary had been resized.
        state: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    state = _each_once({name: tensor.detach().cpu() for name, tensor in state.items()})
    if INIT_ADAPTER in model.peft_config:
        for name, parameter in model.named_parameters():
            if f".{INIT_ADAPTER}." in name:
                key = name.replace(f".{INIT_ADAPTER}.", ".")
                state[key] = torch.cat([state[key], full_tensor(parameter)], dim=0 if "lora_A" in key else 1)
    return state


def _each_once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the further names of tensors that all layers share: a loader fills them all through the first."""
    kept: dict[tuple[int, tuple[int, ...]], str] = {}
    for name in sorted(state, key=lambda name: (name.count("."), name)):
        kept.setdefault((state[name].data_ptr(), tuple(state[name].shape)), name)
    # Tensors without elements have no place of their own, and stay to be found by the check.
    once = {*kept.values(), *(name for name, tensor in state.items() if tensor.numel() == 0)}
    return {name: tensor for name, tensor in state.items() if name in once}


@contextmanager
def _whole_ranks(model: PeftModel) -> Iterator[None]:
    """Let PEFT save AdaLoRA's matrices whole, those of dropped directions as zeros.

    Cut down to their ranks, layers that have lost every direction would be empty tensors, and the importance of
    directions could not move any more when a run goes on.
    """
    config = model.peft_config["default"]
    if not isinstance(config, AdaLoraConfig):
        yield
        return
    pattern, config.rank_pattern = config.rank_pattern, None
    yield
    config.rank_pattern = pattern


def _halves(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained and the fixed half of a LoRA that holds both."""
    parts = {name: tensor.chunk(2, dim=0 if "lora_A" in name else 1) for name, tensor in state.items()}
    return {name: part[0] for name, part in parts.items()}, {name: part[1] for name, part in parts.items()}


def _config_for(model: "Adapted", folder: str) -> Any:
    """The config of one of the adapters that a run's files hold, ready to be loaded by stock PEFT."""
    rows = find_added_tokens(model)
    base = _causal(model)
    names = (
        {} if rows is None else {_short_name(base, name): rows.ids.tolist() for name in _embedding_tensors(base, rows)}
    )
    if folder == TOKEN_ROWS or not isinstance(model, PeftModel):
        ids = next(iter(names.values()))
        return TrainableTokensConfig(
            target_modules=list(names),
            token_indices=ids,
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=base.name_or_path,
            inference_mode=True,
        )
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = None
    if names and isinstance(config, LoraConfig):
        config.trainable_token_indices = names
    if INIT_ADAPTER in model.peft_config:
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    if isinstance(config, LoraConfig) and config.init_lora_weights == "eva":
        # Found once, from rows that whoever loads the file does not have.
        config.init_lora_weights, config.eva_config = True, None
    return config


def _folders(model: "Adapted") -> list[str]:
    own = [""] if isinstance(model, PeftModel) else []
    return own if find_added_tokens(model) is None else list(dict.fromkeys([*own, _owner_of_embeddings(model)[0]]))


def _owner_of_embeddings(model: "Adapted") -> tuple[str, str]:
    """The folder that the rows of new tokens are saved in, and how their tensors' names end there."""
    if not isinstance(model, PeftModel):
        return "", _BESIDE
    inside = isinstance(model.peft_config["default"], LoraConfig)
    return ("", _INSIDE) if inside else (TOKEN_ROWS, _BESIDE)


def _causal(model: "Adapted") -> "PreTrainedModel":
    causal: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return causal


def _embedding_tensors(base: "PreTrainedModel", rows: AddedTokenEmbeddings) -> dict[str, torch.nn.Parameter]:
    """The rows by the name of the layer they belong to; one entry where the head is tied."""
    tensors = {_module_name(base, base.get_input_embeddings()): rows.input_embeddings}
    if rows.output_embeddings is not None:
        tensors[_module_name(base, base.get_output_embeddings())] = rows.output_embeddings
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
        VerificationError: naming the first weight that is not as it should be.
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
