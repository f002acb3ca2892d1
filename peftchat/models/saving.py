"""Stock PEFT adapter files: written, checked, and read back.

Loading such a folder with `PeftModel.from_pretrained` on the base gives the trained model. Where the added ids lie
beyond the base's vocabulary, the base must first be resized with `resize_token_embeddings`. PEFT keeps the embeddings
of added tokens inside an adapter of the LoRA class. Beside any other variant they are a second adapter, in the folder
`token_rows`, which is loaded first and merged into the base.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, TaskType, TrainableTokensConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftchat.errors import VerificationError
from peftchat.models.added_tokens import AddedTokenEmbeddings, find_added_tokens
from peftchat.models.savable import pad_on_left
from peftchat.models.zero import full_tensor
from peftchat.variants.base import Adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Adapted: TypeAlias = PreTrainedModel | PeftModel

WEIGHTS = "adapter_model.safetensors"
TOKEN_ROWS = "token_rows"
"""The folder of the added tokens' embeddings, where they are a second adapter."""

_PREFIX = "base_model.model."
_INSIDE = ".token_adapter.trainable_tokens_delta"
_BESIDE = ".trainable_tokens_delta"

AdapterState = dict[str, dict[str, Tensor]]
"""Folder of an adapter within the run's (`""` for the run's own) -> its tensors by the names that PEFT gives them."""


def is_adapted(model: "Adapted") -> bool:
    """Return whether something is trained beside a frozen model, rather than the model itself."""
    return isinstance(model, PeftModel) or find_added_tokens(model) is not None


def adapter_state(model: "Adapted", adapter: Adapter) -> AdapterState:
    """Return every trained tensor by the name that PEFT saves it under, on the CPU.

    Every process must call it; under ZeRO the values are those of the optimizer's float32 masters.
    """
    state: AdapterState = {}
    if isinstance(model, PeftModel):
        state[""] = _peft_state(model, adapter)
    added = find_added_tokens(model)
    if added is not None:
        folder, ending = _owner_of_embeddings(model)
        tensors = {name: full_tensor(tensor) for name, tensor in _embedding_tensors(_causal(model), added).items()}
        if added.tied and ending == _BESIDE:
            # There PEFT looks for them under the head's name as well.
            head = _module_name(_causal(model), _causal(model).get_output_embeddings())
            tensors[head] = next(iter(tensors.values())).clone()
        state.setdefault(folder, {}).update({f"{_PREFIX}{name}{ending}": tensor for name, tensor in tensors.items()})
    return {
        folder: {name: tensor.contiguous() for name, tensor in tensors.items()} for folder, tensors in state.items()
    }


def save_adapter(model: "Adapted", adapter: Adapter, state: AdapterState, folder: Path) -> None:
    """Write each adapter's config and weights, then open the files again and compare.

    Args:
        model: its configs are written, extended by the ids of added tokens.
        adapter: the recipe's section.
        state: what `adapter_state` returned.
        folder: an existing folder.

    Raises:
        VerificationError: what is on disk is not what was in memory.
    """
    configs = adapter_configs(model, adapter)
    for name, tensors in state.items():
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, str(folder / name / WEIGHTS), metadata={"format": "pt"})
        configs[name].save_pretrained(str(folder / name))
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


def load_adapter_state(model: "Adapted", adapter: Adapter, folder: Path) -> None:
    """Put the tensors of a saved adapter back into a model that was built in the same way.

    Raises:
        VerificationError: the files' tensors are not those of the model.
    """
    state = {name: load_file(str(folder / name / WEIGHTS)) for name in _folders(model)}
    added = find_added_tokens(model)
    if added is not None:
        home, ending = _owner_of_embeddings(model)
        for name, parameter in _embedding_tensors(_causal(model), added).items():
            stored = state[home].pop(f"{_PREFIX}{name}{ending}", None)
            if stored is None or stored.shape != parameter.shape:
                raise VerificationError(
                    f"{folder}: the embeddings of the added tokens for {name} are missing or have another shape"
                )
            with torch.no_grad():
                parameter.copy_(stored)
    if isinstance(model, PeftModel):
        unexpected = adapter.load_adapter_state(model, state[""])
        if unexpected:
            raise VerificationError(f"{folder}: the model has no place for the tensor {unexpected[0]}")


def save_training_modules(model: "Adapted", adapter: Adapter, folder: Path) -> None:
    """Write what a variant trains and its adapter's file does not hold into a checkpoint."""
    if not isinstance(model, PeftModel):
        return
    for name, module in adapter.training_modules(model).items():
        state = {key: full_tensor(tensor).detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
        save_file(state, str(folder / f"{name}.safetensors"), metadata={"format": "pt"})


def load_training_modules(model: "Adapted", adapter: Adapter, folder: Path) -> None:
    """Read what `save_training_modules` wrote.

    Raises:
        VerificationError: a file is missing.
    """
    if not isinstance(model, PeftModel):
        return
    for name, module in adapter.training_modules(model).items():
        file = folder / f"{name}.safetensors"
        if not file.is_file():
            raise VerificationError(f"{file}: the checkpoint lacks what `{adapter.name}` trains")
        module.load_state_dict(load_file(str(file)))


def _peft_state(model: PeftModel, adapter: Adapter) -> dict[str, Tensor]:
    trained = {
        id(parameter): full_tensor(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.endswith(".default")
    }
    # Some methods keep indices and fixed projections in buffers, and share parameters under several names.
    tensors = {
        name: trained.get(id(tensor), tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in trained or not isinstance(tensor, torch.nn.Parameter)
    }
    state = adapter.adapter_state(model, tensors)
    return _each_once({name: tensor.detach().cpu() for name, tensor in state.items()})


def _each_once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one name of each tensor that all layers share: a loader fills them all through the first."""
    first_names: dict[tuple[int, tuple[int, ...]], str] = {}
    for name in sorted(state, key=lambda name: (name.count("."), name)):
        first_names.setdefault((state[name].data_ptr(), tuple(state[name].shape)), name)
    # Empty tensors have no address of their own. They stay, so that the check finds them.
    kept = {*first_names.values(), *(name for name, tensor in state.items() if tensor.numel() == 0)}
    return {name: tensor for name, tensor in state.items() if name in kept}


def adapter_configs(model: "Adapted", adapter: Adapter) -> "dict[str, PeftConfig]":
    """Return the config of each adapter of a run by its folder within the run's."""
    return {name: _config_for(model, adapter, name) for name in _folders(model)}


def _config_for(model: "Adapted", adapter: Adapter, folder: str) -> "PeftConfig":
    """Return the config of one of the adapters in a run's files, ready to be loaded by stock PEFT."""
    added = find_added_tokens(model)
    base = _causal(model)
    ids = (
        {}
        if added is None
        else {_short_name(base, name): added.ids.tolist() for name in _embedding_tensors(base, added)}
    )
    if folder == TOKEN_ROWS or not isinstance(model, PeftModel):
        return TrainableTokensConfig(
            target_modules=list(ids),
            token_indices=next(iter(ids.values())),
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=base.name_or_path,
            inference_mode=True,
        )
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    if ids and adapter.supports_trainable_tokens:
        config.trainable_token_indices = ids
    adapter.export_config(config)
    return config


def _folders(model: "Adapted") -> list[str]:
    """Return the folders of a run's adapters within its own."""
    own = [""] if isinstance(model, PeftModel) else []
    return own if find_added_tokens(model) is None else list(dict.fromkeys([*own, _owner_of_embeddings(model)[0]]))


def _owner_of_embeddings(model: "Adapted") -> tuple[str, str]:
    """Return the folder of the added tokens' embeddings, and the ending of their tensors' names there."""
    if not isinstance(model, PeftModel):
        return "", _BESIDE
    inside = isinstance(model.peft_config["default"], LoraConfig)
    return ("", _INSIDE) if inside else (TOKEN_ROWS, _BESIDE)


def _causal(model: "Adapted") -> "PreTrainedModel":
    causal: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return causal


def _embedding_tensors(base: "PreTrainedModel", rows: AddedTokenEmbeddings) -> dict[str, torch.nn.Parameter]:
    """Return the embeddings by the name of the layer they belong to; one entry where the head is tied."""
    tensors = {_module_name(base, base.get_input_embeddings()): rows.input_embeddings}
    if rows.output_embeddings is not None:
        tensors[_module_name(base, base.get_output_embeddings())] = rows.output_embeddings
    return tensors


def _module_name(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _short_name(model: torch.nn.Module, name: str) -> str:
    """Return the shortest ending of a module's name that no other module shares, by which PEFT matches."""
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
    adapter: Adapter | None,
    dtype: str | None,
    is_main: bool,
    wrapped: Any = None,
) -> None:
    """Write the adapter or the full weights, and the tokenizer, and check what was written.

    Every process must call it; the main one writes.

    Args:
        adapter: the recipe's section; None for full fine-tuning.
        dtype: torch's name of the dtype for full weights; None keeps the one they have. Adapters stay as trained.
        wrapped: DeepSpeed's engine, where it holds the weights.
    """
    if adapter is not None:
        state = adapter_state(model, adapter)
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(model, adapter, state, folder)
            save_tokenizer(tokenizer, folder)
        return
    full = _full_state(model, wrapped, dtype, is_main=is_main)
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        before = model.config.dtype
        if dtype is not None:
            model.config.dtype = getattr(torch, dtype)
        model.save_pretrained(str(folder), state_dict=full)
        model.config.dtype = before
        _check_shapes(folder, full, as_stored(model, full))
        save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the tokenizer with its chat template, so that it pads as batched generation needs it."""
    pad_on_left(tokenizer)
    tokenizer.save_pretrained(str(folder))


def _full_state(model: "PreTrainedModel", wrapped: Any, dtype: str | None, *, is_main: bool) -> dict[str, Tensor]:
    """Return every weight on the CPU of the main process."""
    if wrapped is not None and wrapped.zero_optimization_partition_weights():
        state = wrapped._zero3_consolidated_16bit_state_dict()
    else:
        state = model.state_dict() if is_main else {}
    if not is_main:
        return {}
    target = None if dtype is None else getattr(torch, dtype)
    full = {
        name: tensor.detach().to("cpu", dtype=target if tensor.is_floating_point() else None)
        for name, tensor in state.items()
    }
    if target is torch.float16:
        # What is trained is finite; what is not below 65,504 overflows here.
        bad = next((name for name, tensor in full.items() if not torch.isfinite(tensor).all()), None)
        if bad is not None:
            raise VerificationError(f"the weight {bad} is too large for float16. Set model.dtype: bfloat16")
    return full


def as_stored(model: "PreTrainedModel", state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that transformers stores for weights.

    It splits what it fused while it loaded, such as experts, and gives tensors the names that the base has.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, shapes).items()}


def is_stored_under_other_names(model: "PreTrainedModel") -> bool:
    """Return whether a saved model has other tensors than the model has weights, as mixtures of experts do."""
    state = model.state_dict()
    return set(as_stored(model, state)) != set(state)


def load_full_weights(model: "PreTrainedModel", folder: Path) -> None:
    """Load a saved model's weights into a model of the same shapes, through transformers' conversion of names.

    Raises:
        VerificationError: the folder's weights are not all of the model's.
    """
    stored, report = type(model).from_pretrained(
        str(folder), dtype=model.dtype, output_loading_info=True, local_files_only=True
    )
    lost = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if lost:
        raise VerificationError(f"{folder}: the weight {lost[0]} is in the checkpoint or in the model, but not in both")
    model.load_state_dict(stored.state_dict())


def _check_shapes(folder: Path, full: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Open what was written and check that every weight is there and none is empty.

    Args:
        folder: holds the files.
        full: the weights by their names in the model, of which tied ones are stored once.
        expected: shapes by their names in the files.

    Raises:
        VerificationError: naming the first weight that is missing or has another shape.
    """
    stored: dict[str, list[int]] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(str(file), framework="pt") as shard:
            stored |= {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    tied = {tensor.data_ptr() for name, tensor in full.items() if name in stored}
    for name, shape in expected.items():
        if name not in stored and not (name in full and full[name].data_ptr() in tied):
            raise VerificationError(f"{folder}: the weight {name} was not written")
        if name in stored and (stored[name] != list(shape) or 0 in stored[name]):
            raise VerificationError(f"{folder}: the weight {name} was written with the shape {stored[name]}")
