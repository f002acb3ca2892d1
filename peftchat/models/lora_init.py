"""Adapters that begin at something: in the base's weights, in their quantization error, or in the user's rows.

PiSSA, OLoRA, CorDA and LoRA-GA train `W - s B0 A0 + s B A` and cut their start `s B0 A0` out of the base for it. Here
the base stays as it is, and the start is a second LoRA adapter of PEFT that is never trained, `-B0` and `A0`. The
function and every gradient are the same; nothing is rounded into the base's number type; and what is saved, one LoRA
of twice the rank that holds both, is exactly what was trained, on the base that everyone has.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftchat.errors import UserError
from peftchat.models.source import ModelSource
from peftchat.variants import get_variant

if TYPE_CHECKING:
    from peft import LoraConfig, LoraGAConfig, PeftModel
    from transformers import PreTrainedModel

    from peftchat.recipe import Recipe

INIT_ADAPTER = "start"
"""PEFT's name of the second adapter."""

CalibrationBatches = Callable[[int], Iterator[dict[str, Tensor]]]
"""Number of rows -> batches of one row each: `input_ids`, `attention_mask` and `labels`, shape (1, T)."""

RESIDUAL_INITS = frozenset({"pissa", "olora", "corda", "lora_ga"})


def precompute_init(
    recipe: "Recipe", model: "PreTrainedModel", config: Any, batches: CalibrationBatches, checkpoint: Path | None
) -> None:
    """What has to be known before PEFT wraps the model: covariances for CorDA, gradients for LoRA-GA, EVA's ranks."""
    start = _start(recipe)
    if checkpoint is not None:
        if start == "eva":
            _ranks_of(checkpoint, config)
        return
    if start == "corda":
        _covariances(recipe, model, config, batches)
    elif start == "lora_ga":
        _gradients(recipe, model, config, batches)


def initialize_adapter(
    recipe: "Recipe", model: "PeftModel", batches: CalibrationBatches, checkpoint: Path | None
) -> None:
    """Give the wrapped model its start; with a checkpoint only the place for it."""
    start = _start(recipe)
    if start == "eva":
        if checkpoint is None:
            _begin_eva(recipe, model, batches)
    elif start == "loftq":
        if checkpoint is None:
            _begin_loftq(recipe, model)
    elif start in RESIDUAL_INITS:
        _begin_taken_out(recipe, model, start, known=checkpoint is not None)


def _start(recipe: "Recipe") -> str | None:
    assert recipe.adapter is not None
    return get_variant(recipe.adapter.variant).start


def _covariances(recipe: "Recipe", model: "PreTrainedModel", config: "LoraConfig", batches: CalibrationBatches) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    section: Any = recipe.adapter
    settings = _with_names(model, config)
    settings.corda_config = CordaConfig(corda_method=section.mode)

    def look() -> None:
        for batch in batches(section.start_rows):
            model(input_ids=batch["input_ids"])

    preprocess_corda(model, settings, run_model=look)


def _gradients(recipe: "Recipe", model: "PreTrainedModel", config: "LoraConfig", batches: CalibrationBatches) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    section: Any = recipe.adapter
    settings = _with_names(model, config)
    settings.lora_ga_config = _ga_config(section)

    def look() -> None:
        for batch in batches(section.start_rows):
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:]).backward()

    preprocess_loraga(model, settings, look)


def _ga_config(section: Any) -> "LoraGAConfig":
    from peft import LoraGAConfig

    return LoraGAConfig(direction=section.direction, scale=section.scale, stable_gamma=section.stable_gamma)


def _with_names(model: "PreTrainedModel", config: "LoraConfig") -> "LoraConfig":
    """The config with its layers named one by one: PEFT's preparations do not know `all-linear`."""
    import copy

    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    named: LoraConfig = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
    return named


def _begin_eva(recipe: "Recipe", model: "PeftModel", batches: CalibrationBatches) -> None:
    from peft import initialize_lora_eva_weights

    section: Any = recipe.adapter

    class Batches:
        """What PEFT goes through as often as it needs to."""

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in batches(section.start_rows):
                yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

        def __len__(self) -> int:
            return sum(1 for _ in self)

    # Every process goes through the same rows and finds the same start.
    initialize_lora_eva_weights(model, Batches(), gather_distributed_inputs=False, show_progress_bar=False)


def _ranks_of(checkpoint: Path, config: "LoraConfig") -> None:
    from peft import LoraConfig

    saved = LoraConfig.from_pretrained(str(checkpoint))
    config.rank_pattern = saved.rank_pattern
    config.alpha_pattern = saved.alpha_pattern
    config.target_modules = saved.target_modules


@torch.no_grad()
def _begin_loftq(recipe: "Recipe", model: "PeftModel") -> None:
    """Begin at the best low-rank fit of what quantizing took away (one step of LoftQ's alternation).

    PEFT's `replace_lora_weights_loftq` does the same, but only on a GPU, and fits `B A` as if the layer added it
    unscaled.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.loftq_utils import _low_rank_decomposition, _SafetensorLoader

    stored = _SafetensorLoader(model, str(ModelSource.of_recipe(recipe).download(local_files_only=True)))
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        held = dequantize_module_weight(layer.get_base_layer()).float()
        try:
            original = stored.get_tensor(f"{name.removeprefix('base_model.model.')}.weight")
        except KeyError as error:
            raise UserError(
                f"the base's file has no weights under the name of the layer {name}",
                where=f"model.name: {recipe.model.name}",
                hint="LoftQ compares the file with the quantized layers, name by name; take another variant.",
            ) from error
        factors = _low_rank_decomposition(original.to(held) - held, reduced_rank=layer.r["default"])
        layer.lora_A["default"].weight.data = factors["R"].contiguous()
        layer.lora_B["default"].weight.data = (factors["L"] / layer.scaling["default"]).contiguous()


def _begin_taken_out(recipe: "Recipe", model: "PeftModel", start: str, *, known: bool) -> None:
    """Add the fixed second adapter, and let both begin at the start unless a checkpoint holds it."""
    import copy

    from peft.tuners.lora import LoraLayer

    model.add_adapter(INIT_ADAPTER, copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", INIT_ADAPTER])
    for name, parameter in model.named_parameters():
        if f".{INIT_ADAPTER}." in name:
            parameter.requires_grad_(False)
    if known:
        return
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _begin_layer(layer, recipe, start)


@torch.no_grad()
def _begin_layer(layer: Any, recipe: "Recipe", start: str) -> None:
    """PEFT's own initializer on one layer; the base's weight is put back as it was."""
    base = layer.get_base_layer()
    untouched = base.weight.data.clone()
    if start == "pissa":
        layer.pissa_init("default", "pissa")
    elif start == "olora":
        layer.olora_init("default")
    elif start == "corda":
        layer.corda_init("default", "corda")
    else:
        layer.lora_ga_init("default", _ga_config(recipe.adapter))
    base.weight.data = untouched
    for side, sign in (("lora_A", 1), ("lora_B", -1)):
        held = getattr(layer, side)
        # Contiguous and apart from the base: some initializers hand out views of its factors.
        held["default"].weight.data = held["default"].weight.data.float().contiguous().clone()
        held[INIT_ADAPTER].weight.data = sign * held["default"].weight.data
