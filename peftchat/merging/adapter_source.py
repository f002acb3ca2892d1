"""Adapters on disk: config, weights, and their modules in an empty model.

Every PEFT method that is not named here can be merged. Some have a rule of their own; the others use PEFT's `merge`,
one layer at a time.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from peftchat.console import stderr
from peftchat.errors import UserError, first_line
from peftchat.merging.adapter_file import ADAPTER_WEIGHTS_NAME, base_name, check_weights, each_once
from peftchat.merging.empty_model import EmptyModel, ParameterSlot
from peftchat.merging.qlora_base import Quantization
from peftchat.models.source import ADAPTER_CONFIG, LOAD_ERRORS, MISFIT_ERRORS, ModelKind, ModelSource, read_json
from peftchat.recipe import LoadedRecipe
from peftchat.variants import ADAPTERS, get_adapter
from peftchat.variants.initialized_lora import ResidualLora
from peftchat.variants.low_rank import LoraAdapter

_PROMPTS = "it trains vectors that are put before the prompt, not weights"
_GATED = "what it adds depends on the input, so no fixed weights do the same"
_PROMPTS_HINT = "Use the run folder as it is: `peftchat chat RUN` loads base and adapter."

UNMERGEABLE: dict[str, str] = {
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "CARTRIDGE": "it trains keys and values that are put before the prompt's, not weights",
    "CPT": _PROMPTS,
    "ADAPTION_PROMPT": _GATED,
    "POLY": _GATED,
    "XLORA": _GATED,
    "SHADOW": _GATED,
    "BEFT": "it adds a bias where the model has none",
    "OSF": "its file holds only half of a decomposition of the base, which PEFT makes while it loads",
    "PSOFT": "its file holds only a rotation inside a decomposition of the base that PEFT makes while it loads",
    "FROD": "its file needs a decomposition of all layers of the base at once",
    "ADAMSS": "its file needs a clustering of the base's weights that PEFT makes while it loads",
}
"""Why adapters of a PEFT type without a variant cannot be merged tensor by tensor."""

_NEEDS_FULL_BASE = frozenset({"OSF", "PSOFT", "FROD", "ADAMSS"})


def residual_init(config: Any) -> ResidualLora | None:
    """Return the LoRA initialization that a stock PEFT adapter subtracted.

    It was subtracted from the base, so what was trained is `base - init + adapter`. It is None if there is none, or if
    it cannot be computed again.
    """
    adapter = get_adapter(getattr(config, "init_lora_weights", None))
    if adapter is None or not issubclass(adapter, ResidualLora) or not adapter.recomputable:
        return None
    return adapter()


def _has_lost_init(config: Any) -> bool:
    """Return whether the initialization changed the base in a way that is lost.

    Such a change is not in the adapter's file and cannot be computed again.
    """
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str) or residual_init(config) is not None:
        return False
    changing = [name for name, one in ADAPTERS.items() if issubclass(one, LoraAdapter) and one.changes_base]
    return init.lower().startswith(tuple(changing))


def reject_unmergeable(config: Any, where: str) -> None:
    """Reject an adapter that cannot be merged from its file and the base.

    Args:
        config: a PEFT config.
        where: the adapter, for the message.

    Raises:
        UserError: with the reason and what to do instead.
    """
    kind = str(config.peft_type).rpartition(".")[2].upper()
    for adapter in ADAPTERS.values():
        if adapter.peft_class == type(config).__name__ and not adapter.mergeable:
            why = f"{kind} cannot be merged: {adapter.unmergeable_because}"
            raise UserError(why, where=where, hint=adapter.merge_hint)
    if config.is_prompt_learning or kind in UNMERGEABLE:
        hint = _PROMPTS_HINT
        if kind in _NEEDS_FULL_BASE:
            hint = "Load base and adapter with peft and call merge_and_unload, which holds the whole model in memory."
        raise UserError(f"{kind} cannot be merged: {UNMERGEABLE.get(kind, _PROMPTS)}", where=where, hint=hint)
    if _has_lost_init(config):
        raise UserError(
            f"the adapter was initialized with init_lora_weights={config.init_lora_weights}, which changed the base, "
            "and its file does not hold the change",
            where=where,
            hint="Save the adapter with `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it.",
        )
    if getattr(config, "alora_invocation_tokens", None):
        what = "aLoRA cannot be merged: it acts behind certain tokens only (alora_invocation_tokens)"
        raise UserError(what, where=where, hint=_PROMPTS_HINT)
    if getattr(config, "layer_replication", None):
        raise UserError("it repeats layers of the base, which peft does not merge either", where=where)


ADAPTER = "default"


@dataclass(frozen=True)
class AdaptedModule:
    """One module of the base that PEFT has wrapped: the outermost wrapper around it.

    Attributes:
        path: dotted name of the module in the base.
        layer: PEFT's layer or wrapper.
        slots: the base's parameters inside it, by name; tied ones included.
        residual_init: the LoRA initialization that must first be subtracted from the base, if there is one.
    """

    path: str
    layer: Any
    slots: dict[str, ParameterSlot]
    residual_init: ResidualLora | None = None


@dataclass(frozen=True)
class InstalledAdapter:
    """An adapter with its layers in an empty model.

    Attributes:
        empty_model: the base, with PEFT's layers in it.
        modules: the modules that the adapter changes.
        saved: base parameters that the adapter's file holds complete (trained biases, resized embeddings).
    """

    empty_model: EmptyModel
    modules: tuple[AdaptedModule, ...]
    saved: dict[str, torch.Tensor]


def read_adapter_config(folder: Path) -> Any:
    """Read the adapter's PEFT config.

    Raises:
        UserError: there is none, it cannot be read, or its method cannot be merged.
    """
    from peft import PeftConfig

    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"the folder has no {ADAPTER_CONFIG}", where=str(folder), hint="Name a run folder or a PEFT adapter."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except LOAD_ERRORS as error:
        raise UserError(f"the file cannot be read: {first_line(error)}", where=str(folder / ADAPTER_CONFIG)) from error
    reject_unmergeable(config, str(folder))
    _tell_unknown_settings(config, folder)
    return config


def _tell_unknown_settings(config: Any, folder: Path) -> None:
    """Tell which settings of a file PEFT does not know and leaves out; those that are off change nothing."""
    known = {field.name for field in fields(config)}
    unknown = [
        f"{name} ({value})" for name, value in read_json(folder / ADAPTER_CONFIG).items() if name not in known and value
    ]
    if unknown:
        stderr.print(
            f"{folder / ADAPTER_CONFIG}: this version of PEFT does not know {', '.join(unknown)} and leaves it out. "
            "Check with the PEFT that wrote it that the result is the same.",
            style="yellow", markup=False, highlight=False,
        )  # fmt: skip


def install_adapter(empty_model: EmptyModel, config: Any, folder: Path) -> InstalledAdapter:
    """Wrap the model's modules by `config` and load the adapter's tensors.

    Raises:
        UserError: the adapter does not fit this model: unknown modules, other shapes, missing or left-over tensors.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import set_peft_model_state_dict
    from safetensors.torch import load_file

    config = copy.deepcopy(config)  # PEFT completes it from the model
    init = residual_init(config)
    if init is not None:
        config.init_lora_weights = False
    config.inference_mode = True
    # LoRA's tensors can stay in the mapped file; other methods have index buffers that only real initialization fills.
    mapped = str(config.peft_type).endswith("LORA") and type(config).__name__ == "LoraConfig"
    state = each_once(load_file(folder / ADAPTER_WEIGHTS_NAME))
    try:
        peft_model = PeftModel(empty_model.model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=mapped)
        saved = _saved_base_parameters(state, empty_model)
        state = {key: value for key, value in state.items() if base_name(key) not in saved}
        result = set_peft_model_state_dict(peft_model, state, low_cpu_mem_usage=mapped)
    except MISFIT_ERRORS as error:
        raise _mismatch_error(folder, str(error)) from error
    _check_keys(result, peft_model, folder, empty_model.ties)
    peft_model.eval()
    return InstalledAdapter(empty_model, tuple(_adapted_modules(empty_model, init)), saved)


def _saved_base_parameters(state: dict[str, torch.Tensor], empty_model: EmptyModel) -> dict[str, torch.Tensor]:
    from peft.utils.other import ModulesToSaveWrapper

    wrapped = {name for name, module in empty_model.model.named_modules() if isinstance(module, ModulesToSaveWrapper)}

    def is_free(name: str) -> bool:
        return name in empty_model.slots and not any(name.startswith(f"{path}.") for path in wrapped)

    saved = {name: value for key, value in state.items() if is_free(name := base_name(key))}
    for pair in empty_model.ties.items():
        # Stock PEFT loads either into the one parameter that both share.
        value = next((saved[name] for name in reversed(pair) if name in saved), None)
        if value is not None:
            saved.update((name, value) for name in pair if is_free(name))
    return saved


def _mismatch_error(folder: Path, why: str) -> UserError:
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    shapes = [line for line in lines if "size mismatch" in line]
    return UserError(
        f"the adapter does not fit the base: {(shapes or lines or ['no reason given'])[0]}",
        where=str(folder),
        hint="It was trained on another base: check `model.name` of its recipe.",
    )


def _check_keys(result: Any, peft_model: Any, folder: Path, ties: Mapping[str, str]) -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = peft_model.peft_config[ADAPTER]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    # Banks that several layers share are in the file once and in the model many times.
    shared = [mark for adapter in ADAPTERS.values() for mark in adapter.shared_tensors]
    missing = [key for key in result.missing_keys if prefix in key and f".{ADAPTER}" in key]
    missing = [key for key in missing if not any(mark in key for mark in shared)]
    # The rows of a tied head are those of the embedding; some files hold a copy.
    missing = [key for key in missing if not _of_tied_rows(key, ties)]
    if missing:
        raise _mismatch_error(folder, f"{len(missing)} of its tensors are missing, first {missing[0]}")
    unexpected = [key for key in result.unexpected_keys if not _of_tied_rows(key, ties)]
    if unexpected:
        count, first = len(unexpected), unexpected[0]
        raise _mismatch_error(folder, f"{count} of its tensors have no place in it, first {first}")


def _of_tied_rows(key: str, ties: Mapping[str, str]) -> bool:
    layer, rows, _ = base_name(key).partition(".trainable_tokens_")
    return bool(rows) and f"{layer}.weight" in ties


def _adapted_modules(empty_model: EmptyModel, init: ResidualLora | None) -> Iterator[AdaptedModule]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[str] = []
    for path, module in empty_model.model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            found.append(path)
            yield AdaptedModule(path, module, empty_model.within(path), init)


_RUN_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class AdapterSource:
    """A trained adapter and the base that it was trained on.

    Attributes:
        model: the adapter's folder.
        config: the adapter's PEFT config.
        base: the base model.
        quantization: how the base was quantized in training; None if it was not.
        recipe: the run's recipe; None for a bare adapter.
    """

    model: ModelSource
    config: Any
    base: ModelSource
    quantization: Quantization | None
    recipe: LoadedRecipe | None

    @classmethod
    def open(cls, folder: Path, base: str | None = None) -> "AdapterSource":
        """Read a run folder and check its adapter's file.

        Args:
            folder: the run or adapter.
            base: folder or hub id of its base; None for the one that it was trained on.

        Raises:
            UserError: not a run folder, a run of method `full`, or an adapter that is damaged or cannot be merged.
        """
        source = ModelSource.open(str(folder), local=True, base=base)
        recipe = source.recipe()
        if recipe is not None and recipe.recipe.method == "full":
            raise UserError(
                "this run trained every weight, so there is nothing to merge",
                where=str(folder),
                hint="The run folder is already a model: `peftchat chat RUN` and every other tool load it as it is.",
            )
        if source.kind is ModelKind.FULL:
            raise UserError(
                "this is a model, not an adapter, so there is nothing to merge",
                where=str(folder),
                hint="Use it as it is, or name the run folder that holds the adapter.",
            )
        source.require_model()
        config = read_adapter_config(folder)
        check_weights(folder)
        quantization = None
        if recipe is not None and recipe.recipe.method == "qlora" and recipe.recipe.quantization is not None:
            section, dtype = recipe.recipe.quantization, _RUN_DTYPES[recipe.recipe.model.dtype]
            quantization = Quantization(section.bits, section.type, section.double, dtype)
        return cls(source, config, source.base(), quantization, recipe)

    @property
    def folder(self) -> Path:
        """The folder of the run or the adapter."""
        return self.model.path


def unquantized_config(base: ModelSource) -> Any:
    """Return the base's transformers config.

    Raises:
        UserError: it cannot be loaded, or the base is stored quantized.
    """
    config = base.config()
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "the base is stored quantized, and a merge needs its full weights",
            where=base.where,
            hint="Set `model.name` of the recipe to the 16-bit model it was made from.",
        )
    return config
