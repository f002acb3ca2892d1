"""Load a PEFT adapter into a model without weights, and find the modules that it changes."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.hollow import HollowModel, Slot
from peftchat.merging.methods import RESIDUAL_INITS, refuse_unfoldable
from peftchat.merging.shards import read_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER = "default"
_ROOT = "base_model.model."


@dataclass(frozen=True)
class Site:
    """One module of the base that PEFT has wrapped: the outermost wrapper around it.

    Attributes:
        path: dotted name of the module in the base.
        module: PEFT's layer or wrapper.
        slots: the base's parameters inside it, by name; tied ones included.
        start: the LoRA initialisation that must be taken out of the base first, if there was one.
    """

    path: str
    module: Any
    slots: dict[str, Slot]
    start: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter in place.

    Attributes:
        hollow: the model it sits in.
        model: the `PeftModel` around it.
        sites: the modules it changes.
        saved: parameters of the base that the adapter's file holds whole (trained biases, resized embeddings).
        folder: where it came from.
    """

    hollow: HollowModel
    model: Any
    sites: tuple[Site, ...]
    saved: dict[str, torch.Tensor]
    folder: Path


def read_config(folder: Path) -> Any:
    """The adapter's PEFT config.

    Raises:
        InputError: there is none, it cannot be read, or its method cannot be folded.
    """
    from peft import PeftConfig

    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"no {CONFIG_NAME} here", where=str(folder), cure="Name a run folder or a PEFT adapter.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(folder / CONFIG_NAME)) from error
    refuse_unfoldable(config, str(folder))
    return config


def check_weights(folder: Path) -> None:
    """Open the adapter's file and look at every entry.

    Raises:
        InputError: missing, damaged, empty, or with a tensor of no elements, which is what a sharded trainer leaves
            when it saves without gathering.
    """
    entries = read_header(folder / WEIGHTS_NAME)
    if not entries:
        raise UserError("the adapter holds no tensors", where=str(folder / WEIGHTS_NAME))
    empty = [name for name, entry in entries.items() if entry.bytes == 0]
    if empty:
        raise UserError(
            f"{len(empty)} of {len(entries)} tensors have no elements, first {empty[0]}: the adapter was saved "
            "from a sharded model without gathering it",
            where=str(folder / WEIGHTS_NAME),
            cure="Save it again from a checkpoint of the run.",
        )


def vocabulary_needed(config: Any, folder: Path) -> int:
    """How many rows the base's embeddings must have for this adapter (0: it does not say)."""
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    ids = [index for each in lists for index in each]
    names = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "lm_head.weight")
    whole = [entry.shape[0] for name, entry in read_header(folder / WEIGHTS_NAME).items() if name.endswith(names)]
    return max([index + 1 for index in ids] + whole, default=0)


def install_adapter(hollow: HollowModel, config: Any, folder: Path) -> Adapter:
    """Wrap the model's modules as `config` says and load the adapter's tensors.

    Raises:
        InputError: the adapter does not fit this model: unknown modules, other shapes, missing or left-over tensors.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import set_peft_model_state_dict
    from safetensors.torch import load_file

    config = copy.deepcopy(config)  # PEFT fills in what it finds in the model
    start = getattr(config, "init_lora_weights", None)
    residual = start.lower() if isinstance(start, str) and start.lower() in RESIDUAL_INITS else None
    if residual:
        config.init_lora_weights = False
    config.inference_mode = True
    # LoRA's tensors can stay in the mapped file; other methods have index buffers that only a real start fills.
    mapped = str(config.peft_type).endswith("LORA") and type(config).__name__ == "LoraConfig"
    state = load_file(folder / WEIGHTS_NAME)
    try:
        model = PeftModel(hollow.model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=mapped)
        saved = _saved_whole(state, hollow)
        state = {key: value for key, value in state.items() if _base_name(key) not in saved}
        result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=mapped)
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        raise _misfit(folder, str(error)) from error
    _check_keys(result, model, folder, hollow.ties)
    model.eval()
    return Adapter(hollow, model, tuple(_sites(hollow, residual)), saved, folder)


def _base_name(key: str) -> str:
    return key.removeprefix(_ROOT).replace(".base_layer.", ".")


def _saved_whole(state: dict[str, torch.Tensor], hollow: HollowModel) -> dict[str, torch.Tensor]:
    from peft.utils.other import ModulesToSaveWrapper

    wrapped = {name for name, module in hollow.model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    names = {key: _base_name(key) for key in state}
    return {
        name: state[key]
        for key, name in names.items()
        if name in hollow.slots and not any(name.startswith(f"{path}.") for path in wrapped)
    }


def _misfit(folder: Path, why: str) -> UserError:
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    shapes = [line for line in lines if "size mismatch" in line]
    return UserError(
        f"the adapter does not fit the base: {(shapes or lines or ['no reason given'])[0]}",
        where=str(folder),
        cure="It was trained on another base: check `model.name` of its recipe.",
    )


def _check_keys(result: Any, model: Any, folder: Path, ties: Mapping[str, str]) -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = model.peft_config[ADAPTER]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    # Banks that several layers share are in the file once and hang in the model many times.
    shared = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.", "randlora_A", "randlora_B")
    missing = [key for key in result.missing_keys if prefix in key and f".{ADAPTER}" in key]
    missing = [key for key in missing if not any(mark in key for mark in shared)]
    # The rows of a tied head are those of the embedding.
    missing = [key for key in missing if f"{_base_name(key).partition('.trainable_tokens_')[0]}.weight" not in ties]
    if missing:
        raise _misfit(folder, f"{len(missing)} of its tensors are missing, first {missing[0]}")
    if result.unexpected_keys:
        count, first = len(result.unexpected_keys), result.unexpected_keys[0]
        raise _misfit(folder, f"{count} of its tensors have no place in it, first {first}")


def _sites(hollow: HollowModel, start: str | None) -> Iterator[Site]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[str] = []
    for path, module in hollow.model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            found.append(path)
            yield Site(path, module, hollow.within(path), start)
