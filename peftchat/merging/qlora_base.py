"""Which base a QLoRA adapter is folded into: the original weights, or those it was trained on.

While training, the base was `dequantize(quantize(W))`; the adapter has learned to live with the error of that. Folding
into W leaves the error out, folding into the dequantized weights keeps it. Both are measured against what was trained:
the relative distance, over a sample of the changed matrices, between the stored result and `dequantized base + update`
in float32.
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
    """The base taken, and for a quantized run both distances to what was trained (0 is the same, 1 unrelated)."""

    taken: BaseKind
    distance_original: float | None = None
    distance_dequantized: float | None = None


def select_base(
    mode: BaseMode,
    original: tuple[BaseWeights, Mapping[str, AddDelta]],
    dequantized: tuple[BaseWeights, Mapping[str, AddDelta]] | None,
    dtype: torch.dtype | None,
) -> SelectedBase:
    """Pick by `mode`; `auto` takes the nearer one, and the original where the run was not quantized.

    Args:
        mode: what the user asked for.
        original: the stored base and the updates on it.
        dequantized: the base as it was while training; None for a run on an unquantized base.
        dtype: type of the merged weights; None as stored.

    Raises:
        UserError: `dequantized` was asked for and the base was not quantized.
    """
    if dequantized is None:
        if mode == "dequantized":
            raise UserError("the run was not trained on a quantized base", where="--base", hint="Leave the flag out.")
        return SelectedBase("original")
    weights, updates = dequantized
    names = [name for name in updates if name in weights.round_tripped]
    names = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
    apart = {"original": 0.0, "dequantized": 0.0}
    size = 0.0
    for name in names:
        stored = dtype or weights.dtype(name)
        trained = _folded(weights, updates, name)
        size += float(trained.square().sum())
        apart["dequantized"] += float((trained.to(stored).to(torch.float32) - trained).square().sum())
        plain = _folded(*original, name).to(stored).to(torch.float32)
        apart["original"] += float((plain - trained).square().sum())
    weights.forget()
    distances = {kind: (square / size) ** 0.5 if size else 0.0 for kind, square in apart.items()}
    nearer: BaseKind = "original" if distances["original"] < distances["dequantized"] else "dequantized"
    return SelectedBase(nearer if mode == "auto" else mode, distances["original"], distances["dequantized"])


def _folded(weights: BaseWeights, updates: Mapping[str, AddDelta], name: str) -> torch.Tensor:
    return updates[name].rows(weights.rows(name).to(torch.float32, copy=True), 0)


_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit types."""


@dataclass(frozen=True)
class Quantization:
    """How the base was held: the recipe's `quantization` section and the type it was quantized from."""

    bits: int
    type: str
    double: bool
    dtype: torch.dtype

    def round_trip(self, weights: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Quantize a matrix and dequantize it; the stored type is kept.

        Args:
            weights: the matrix as the checkpoint holds it.
            transposed: it is stored input by output, as Conv1D does; the quantized layer holds it the other way round.
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


def quantized_parameters(hollow: EmptyModel) -> dict[str, bool]:
    """The parameters that transformers would quantize in this model, and whether each is stored transposed.

    It is transformers' own choice, made on a copy: the output head and what the model asks to keep are left alone.
    Call it before an adapter is installed.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import BitsAndBytesConfig

    model = copy.deepcopy(hollow.model)
    config = BitsAndBytesConfig(load_in_4bit=True)
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    before = dict(model.named_modules())
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    return {
        f"{name}.weight": isinstance(before[name], Conv1D)
        for name, module in model.named_modules()
        if name in before and type(module) is not type(before[name])
    }
