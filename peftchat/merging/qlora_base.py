"""The base that a QLoRA adapter is merged into: the original weights, or those it was trained on.

In training the base was `dequantize(quantize(W))`, and the adapter adapted to the quantization error. Merging into W
removes the error, merging into the dequantized weights keeps it. Both results are compared with the trained weights,
`dequantized base + delta` in float32: the relative L2 distance over a sample of the changed matrices.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from peftchat.errors import UserError
from peftchat.merging.base_weights import BaseWeights
from peftchat.merging.deltas import AddDelta
from peftchat.merging.empty_model import EmptyModel

BaseMode = Literal["auto", "original", "dequantized"]
BaseKind = Literal["original", "dequantized"]

_SAMPLE = 8


@dataclass(frozen=True)
class SelectedBase:
    """The selected base, and for a quantized run both distances to the trained weights (0: equal, 1: unrelated)."""

    kind: BaseKind
    distance_original: float | None = None
    distance_dequantized: float | None = None


def select_base(
    mode: BaseMode,
    original: tuple[BaseWeights, Mapping[str, AddDelta]],
    dequantized: tuple[BaseWeights, Mapping[str, AddDelta]] | None,
    dtype: torch.dtype | None,
) -> SelectedBase:
    """Select the base by `mode`; `auto` selects the nearer one, or the original if the run was not quantized.

    Args:
        mode: the user's option.
        original: the stored base and its deltas.
        dequantized: the base as it was in training, and its deltas; None for a run on an unquantized base.
        dtype: dtype of the merged weights; None as stored.

    Raises:
        UserError: the mode is `dequantized` and the base was not quantized.
    """
    if dequantized is None:
        if mode == "dequantized":
            raise UserError("the run was not trained on a quantized base", where="--base", hint="Leave the flag out.")
        return SelectedBase("original")
    weights, deltas = dequantized
    names = [name for name in deltas if name in weights.round_tripped]
    names = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
    squared_distance = {"original": 0.0, "dequantized": 0.0}
    squared_norm = 0.0
    for name in names:
        stored = dtype or weights.dtype(name)
        trained = _merged_weight(weights, deltas, name)
        squared_norm += float(trained.square().sum())
        squared_distance["dequantized"] += float((trained.to(stored).to(torch.float32) - trained).square().sum())
        merged = _merged_weight(*original, name).to(stored).to(torch.float32)
        squared_distance["original"] += float((merged - trained).square().sum())
    weights.release()
    distances = {
        kind: (square / squared_norm) ** 0.5 if squared_norm else 0.0 for kind, square in squared_distance.items()
    }
    nearer: BaseKind = "original" if distances["original"] < distances["dequantized"] else "dequantized"
    return SelectedBase(nearer if mode == "auto" else mode, distances["original"], distances["dequantized"])


def _merged_weight(weights: BaseWeights, deltas: Mapping[str, AddDelta], name: str) -> torch.Tensor:
    return deltas[name].apply(weights.rows(name).to(torch.float32, copy=True), 0)


_BLOCK = 64
"""Number of weights that share a scale in bitsandbytes' 4-bit types."""


@dataclass(frozen=True)
class Quantization:
    """How the base was quantized: the recipe's `quantization` section and the dtype before quantization."""

    bits: int
    type: str
    double: bool
    dtype: torch.dtype

    def round_trip(self, weights: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Quantize and dequantize a matrix; the stored dtype is kept.

        Args:
            weights: the stored matrix.
            transposed: it is stored as input x output, as Conv1D does; the quantized layer stores output x input.
        """
        if transposed:
            return self.round_trip(weights.T.contiguous()).T.contiguous()
        from bitsandbytes import functional

        source = weights.to(self.dtype)
        if self.bits == 8:
            codes, scales, _ = functional.int8_vectorwise_quant(source.to(torch.float16))
            return functional.int8_vectorwise_dequant(codes, scales).to(weights.dtype)
        codes, state = functional.quantize_4bit(
            source, blocksize=_BLOCK, compress_statistics=self.double, quant_type=self.type
        )
        return functional.dequantize_4bit(codes, state).to(weights.dtype)


def quantized_parameters(empty_model: EmptyModel) -> dict[str, bool]:
    """Return the parameters that transformers quantizes in this model, and whether each is stored transposed.

    Transformers selects them on a copy of the model: it excludes the output head and modules that the model lists.
    Call this before an adapter is installed.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import BitsAndBytesConfig

    model = copy.deepcopy(empty_model.model)
    config = BitsAndBytesConfig(load_in_4bit=True)
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    before = dict(model.named_modules())
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    return {
        f"{name}.weight": isinstance(before[name], Conv1D)
        for name, module in model.named_modules()
        if name in before and type(module) is not type(before[name])
    }
