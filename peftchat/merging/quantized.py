"""What quantisation did to the base while a QLoRA adapter was trained on it.

Weights are quantised and dequantised again, a tensor at a time, as transformers does when it loads: the same modules,
block size, second quantisation of the scales and number type. The kernels are bitsandbytes' own for the CPU; a GPU's
may round a value that lies between two codes the other way.
"""

import copy
from dataclasses import dataclass

import torch

from peftchat.merging.hollow import HollowModel

_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit types."""


@dataclass(frozen=True)
class Quantization:
    """How the base was held: the recipe's `quantization` section and the type it was quantised from."""

    bits: int
    type: str
    double: bool
    dtype: torch.dtype

    def round_trip(self, weights: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Quantise a matrix and dequantise it; the stored type is kept.

        Args:
            weights: the matrix as the checkpoint holds it.
            transposed: it is stored input by output, as Conv1D does; the quantised layer holds it the other way round.
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


def quantized_parameters(hollow: HollowModel) -> dict[str, bool]:
    """The parameters that transformers would quantise in this model, and whether each is stored transposed.

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
