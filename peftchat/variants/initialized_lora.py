"""LoRA with an initialization of its own, found in the base's weights or in training examples.

PiSSA, OLoRA, CorDA and LoRA-GA train `W - s B0 A0 + s B A`, and PEFT subtracts their initialization `s B0 A0` from the
base for that. Here the base stays as it is, and the subtracted part is a second LoRA adapter of PEFT that is never
trained, `-B0` and `A0`. The function and every gradient are the same. Nothing is rounded to the base's dtype. The file
holds one LoRA of twice the rank, with both: exactly what was trained, for the base that everyone has.
"""

import copy
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftchat.errors import UserError
from peftchat.variants.base import (
    CalibrationBatches,
    Dropout,
    Formerly,
    NotInConfig,
    Paper,
    incompatible,
    unquantized_only,
)
from peftchat.variants.low_rank import LoraAdapter
from peftchat.variants.model_shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft import LoraConfig, LoraGAConfig, PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor
    from transformers import PreTrainedModel

_SUBTRACTED = "its initialization is subtracted from the base's full weights, which ZeRO-3 partitions"
_READ = "its initialization reads the base's full layers, which ZeRO-3 partitions"
_DECOMPOSED = "its initialization decomposes full-precision weights; a quantized base has none"

INIT_ADAPTER = "start"
"""PEFT's name of the second adapter, which holds the subtracted initialization."""

CalibrationSamples = Annotated[
    NotInConfig[int],
    Formerly("start_rows"),
    Field(ge=1, description="Training examples that are read to compute the initialization."),
]


def _check_rank(adapter: LoraAdapter, shape: ModelShape, *, vectors_per_rank: int) -> None:
    """Raise a UserError for a rank that needs more singular vectors than a layer has."""
    smallest = min(min(size) for size in shape.sizes(adapter.target_modules))
    largest = smallest // vectors_per_rank
    if adapter.r > largest:
        raise UserError(
            f"the initialization needs {vectors_per_rank * adapter.r} singular vectors, and the smallest layer has "
            f"{smallest}",
            where=f"adapter.r: {adapter.r}",
            hint=f"Use at most r: {largest}, or other target_modules.",
        )


class ResidualLora(LoraAdapter):
    """LoRA with an initialization that PEFT subtracts from the base.

    Attributes:
        vectors_per_rank: singular vectors of a weight that a rank of 1 needs.
    """

    changes_base = True
    vectors_per_rank: ClassVar[int] = 1
    incompatible_with = incompatible(unquantized_only(_DECOMPOSED), zero3=_SUBTRACTED)

    @abstractmethod
    def initialize_layer(self, layer: "LoraLayer", adapter_name: str) -> None:
        """Run PEFT's initializer on one layer, which also changes the base's weight."""

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LoraConfig.

        Raises:
            UserError: a layer has too few singular vectors for the rank.
        """
        _check_rank(self, shape, vectors_per_rank=self.vectors_per_rank)
        return super().peft_settings(shape)

    def wrap(self, model: "PreTrainedModel", config: "PeftConfig") -> "PeftModel":
        """Put the adapter around the base, and a second one that is not trained."""
        wrapped = super().wrap(model, config)
        wrapped.add_adapter(INIT_ADAPTER, copy.deepcopy(wrapped.peft_config["default"]))
        wrapped.base_model.set_adapter(["default", INIT_ADAPTER])
        for name, parameter in wrapped.named_parameters():
            if f".{INIT_ADAPTER}." in name:
                parameter.requires_grad_(False)
        return wrapped

    def initialize(self, model: "PeftModel", batches: CalibrationBatches) -> None:
        """Set both adapters to the initialization, the second one with the opposite sign."""
        import torch
        from peft.tuners.lora import LoraLayer

        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            base = layer.get_base_layer()
            original = base.weight.data.clone()
            with torch.no_grad():
                self.initialize_layer(layer, "default")
            base.weight.data = original
            for matrices, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
                # Contiguous copies: some initializers return views of their factors of the base.
                trained = matrices["default"].weight.data.float().contiguous().clone()
                matrices["default"].weight.data = trained
                matrices[INIT_ADAPTER].weight.data = sign * trained

    def adapter_state(self, model: "PeftModel", tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return one LoRA of twice the rank: the trained matrices, then the fixed ones."""
        import torch

        state = super().adapter_state(model, tensors)
        for name, parameter in model.named_parameters():
            if f".{INIT_ADAPTER}." in name:
                key = name.replace(f".{INIT_ADAPTER}.", ".")
                fixed = parameter.detach().to(state[key].device)
                state[key] = torch.cat([state[key], fixed], dim=_rank_dim(key))
        return state

    def load_adapter_state(self, model: "PeftModel", state: "dict[str, Tensor]") -> list[str]:
        """Put the first half of the ranks into the trained adapter, the second half into the fixed one."""
        from peft import set_peft_model_state_dict

        halves = {name: tensor.chunk(2, dim=_rank_dim(name)) for name, tensor in state.items()}
        fixed = {name: half for name, (_, half) in halves.items()}
        set_peft_model_state_dict(model, fixed, adapter_name=INIT_ADAPTER)
        return super().load_adapter_state(model, {name: half for name, (half, _) in halves.items()})

    def export_config(self, config: "PeftConfig") -> None:
        """Double the rank, and the scale with it."""
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha


def _rank_dim(name: str) -> int:
    """Return the dimension of a LoRA matrix that counts its ranks."""
    return 0 if "lora_A" in name else 1


def _named_targets(model: "PreTrainedModel", config: "LoraConfig") -> "LoraConfig":
    """Return the config with its layers named one by one: PEFT's preparations do not know `all-linear`."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    named: LoraConfig = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
    return named


class Pissa(ResidualLora):
    """LoRA initialized with the largest singular vectors of each weight, which it then trains."""

    title = "PiSSA"
    paper = Paper("Meng et al.", 2024, "2404.02948")
    learning_rate = 1e-4
    auto_factor = 0.5
    tested_zero_stages = frozenset({"zero2"})
    recomputable = True

    variant: Literal["pissa"] = "pissa"

    def initialize_layer(self, layer: "LoraLayer", adapter_name: str) -> None:
        """Run PEFT's PiSSA on one layer."""
        layer.pissa_init(adapter_name, "pissa")


class Olora(ResidualLora):
    """LoRA initialized with orthonormal factors (QR) of each weight."""

    title = "OLoRA"
    paper = Paper("Büyükakyüz", 2024, "2406.01775")
    learning_rate = 1e-4
    auto_factor = 0.5
    recomputable = True

    variant: Literal["olora"] = "olora"

    def initialize_layer(self, layer: "LoraLayer", adapter_name: str) -> None:
        """Run PEFT's OLoRA on one layer."""
        layer.olora_init(adapter_name)


class Corda(ResidualLora):
    """LoRA initialized with factors of each weight, oriented by the covariance of its inputs on training examples."""

    title = "CorDA"
    paper = Paper("Yang et al.", 2024, "2406.05223")
    learning_rate = 1e-4
    auto_factor = 0.5
    needs_calibration_data = True

    variant: Literal["corda"] = "corda"
    corda_method: Annotated[NotInConfig[Literal["ipm", "kpm"]], Formerly("mode")] = Field(
        "ipm",
        description="`ipm` trains the directions that matter most for the examples, to learn them faster; `kpm` those "
        "that matter least, to preserve the base's knowledge.",
    )
    calibration_samples: CalibrationSamples = 128

    def precompute_init(self, model: "PreTrainedModel", config: "LoraConfig", batches: CalibrationBatches) -> None:
        """Compute the covariance of each layer's inputs."""
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        settings = _named_targets(model, config)
        settings.corda_config = CordaConfig(corda_method=self.corda_method)

        def run_model() -> None:
            for batch in batches(self.calibration_samples):
                model(input_ids=batch["input_ids"])

        preprocess_corda(model, settings, run_model=run_model)

    def initialize_layer(self, layer: "LoraLayer", adapter_name: str) -> None:
        """Run PEFT's CorDA on one layer."""
        layer.corda_init(adapter_name, "corda")


class LoraGa(ResidualLora):
    """LoRA initialized so that its first step follows the gradient of full fine-tuning on training examples."""

    title = "LoRA-GA"
    paper = Paper("Wang et al.", 2024, "2407.05000")
    aliases = ("lora-ga",)
    learning_rate = 5e-5
    auto_factor = 0.25
    incompatible_with = incompatible(
        unquantized_only("its initialization needs the gradient of full-precision weights"), zero3=_SUBTRACTED
    )
    needs_calibration_data = True
    # Half of the vectors go to one matrix, the other half to the other.
    vectors_per_rank = 2

    variant: Literal["lora_ga"] = "lora_ga"
    direction: NotInConfig[Literal["ArBr", "A2rBr", "ArB2r", "random"]] = Field(
        "ArB2r", description="Which singular vectors of the gradient go to which of the two matrices."
    )
    scale: NotInConfig[Literal["stable", "weight_svd", "gd_scale", "unit"]] = Field(
        "stable", description="How the scale of the initialization is chosen."
    )
    stable_gamma: NotInConfig[int] = Field(
        16, ge=1, description="Divisor of the scale for `scale: stable`; a larger one makes initial values smaller."
    )
    calibration_samples: CalibrationSamples = 32

    def precompute_init(self, model: "PreTrainedModel", config: "LoraConfig", batches: CalibrationBatches) -> None:
        """Compute the gradient of each weight."""
        import torch
        from peft.tuners.lora.loraga import preprocess_loraga

        settings = _named_targets(model, config)
        settings.lora_ga_config = self._lora_ga_config()

        def run_model() -> None:
            for batch in batches(self.calibration_samples):
                logits = model(input_ids=batch["input_ids"]).logits[0, :-1].float()
                torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:]).backward()

        preprocess_loraga(model, settings, run_model)

    def _lora_ga_config(self) -> "LoraGAConfig":
        from peft import LoraGAConfig

        return LoraGAConfig(direction=self.direction, scale=self.scale, stable_gamma=self.stable_gamma)

    def initialize_layer(self, layer: "LoraLayer", adapter_name: str) -> None:
        """Run PEFT's LoRA-GA on one layer."""
        layer.lora_ga_init(adapter_name, self._lora_ga_config())


class Eva(LoraAdapter):
    """LoRA initialized with the main directions of each layer's inputs, with more rank where they need it."""

    title = "EVA"
    paper = Paper("Paischer et al.", 2024, "2410.07170")
    learning_rate = 2e-4
    auto_factor = 1.0
    incompatible_with = incompatible(zero3=_READ)
    needs_calibration_data = True
    vllm = "merged"

    variant: Literal["eva"] = "eva"
    dropout: Dropout = 0.0
    rho: NotInConfig[float] = Field(
        2.0, ge=1, description="How uneven ranks may become: at most `rho * r` in a layer. 1 keeps them equal."
    )
    calibration_samples: CalibrationSamples = 128

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LoraConfig, with EVA's own config in it."""
        from peft import EvaConfig

        eva_config = EvaConfig(rho=self.rho, use_label_mask=False)
        return {**super().peft_settings(shape), "init_lora_weights": "eva", "eva_config": eva_config}

    def restore_init(self, config: "LoraConfig", checkpoint: Path) -> None:
        """Take the ranks from the checkpoint's config."""
        from peft import LoraConfig

        saved = LoraConfig.from_pretrained(str(checkpoint))
        config.rank_pattern = saved.rank_pattern
        config.alpha_pattern = saved.alpha_pattern
        config.target_modules = saved.target_modules

    def initialize(self, model: "PeftModel", batches: CalibrationBatches) -> None:
        """Decompose the layers' inputs; every process reads the same examples and finds the same values."""
        from peft import initialize_lora_eva_weights

        examples = _RepeatableBatches(batches, self.calibration_samples)
        initialize_lora_eva_weights(model, examples, gather_distributed_inputs=False, show_progress_bar=False)

    def export_config(self, config: "LoraConfig") -> None:
        """Leave out the initialization, which loaders of the file cannot repeat without the examples."""
        config.init_lora_weights, config.eva_config = True, None


class _RepeatableBatches:
    """Batches for EVA, which PEFT iterates as often as it needs to."""

    def __init__(self, batches: CalibrationBatches, samples: int) -> None:
        self._batches = batches
        self._samples = samples

    def __iter__(self) -> "Iterator[dict[str, Tensor]]":
        for batch in self._batches(self._samples):
            yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Loftq(LoraAdapter):
    """LoRA on a 4-bit base, initialized to compensate as much of the quantization error as its rank can."""

    title = "LoftQ"
    paper = Paper("Li et al.", 2023, "2310.08659")
    learning_rate = 2e-4
    auto_factor = 1.0
    incompatible_with = incompatible(
        {
            "unquantized": "it compensates the error of a quantized base, and an unquantized one has none",
            "8 bits": "PEFT compares the base's weights with their 4-bit form only",
        },
        zero3=_READ,
    )

    changes_base = True

    variant: Literal["loftq"] = "loftq"

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LoraConfig.

        Raises:
            UserError: a layer has too few singular vectors for the rank.
        """
        _check_rank(self, shape, vectors_per_rank=1)
        return super().peft_settings(shape)

    def initialize(self, model: "PeftModel", batches: CalibrationBatches) -> None:
        """Set the matrices to the best low-rank fit of the quantization error (one step of LoftQ's alternation).

        PEFT's `replace_lora_weights_loftq` does the same, but only on a GPU, and fits `B A` as if the layer added it
        unscaled.

        Raises:
            UserError: the base's file has other names for its weights.
        """
        import torch
        from huggingface_hub import snapshot_download
        from peft.tuners.lora import LoraLayer
        from peft.utils.integrations import dequantize_module_weight
        from peft.utils.loftq_utils import _low_rank_decomposition, _SafetensorLoader

        config = model.peft_config["default"]
        folder = config.base_model_name_or_path
        if not Path(folder).is_dir():
            folder = snapshot_download(folder, revision=config.revision, local_files_only=True)
        stored = _SafetensorLoader(model, folder)
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            quantized = dequantize_module_weight(layer.get_base_layer()).float()
            try:
                original = stored.get_tensor(f"{name.removeprefix('base_model.model.')}.weight")
            except KeyError as error:
                raise UserError(
                    f"the base's file has no weight named like the layer {name}",
                    where=f"model.name: {config.base_model_name_or_path}",
                    hint="Choose another variant: LoftQ compares the file with the quantized layers, name by name.",
                ) from error
            with torch.no_grad():
                rank, scaling = layer.r["default"], layer.scaling["default"]
                factors = _low_rank_decomposition(original.to(quantized) - quantized, reduced_rank=rank)
                layer.lora_A["default"].weight.data = factors["R"].contiguous()
                layer.lora_B["default"].weight.data = (factors["L"] / scaling).contiguous()
