"""Reading from a loaded model what variants need to know of it."""

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftchat.variants.base import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_facts(model: "PreTrainedModel") -> ModelShape:
    """Names and sizes of the model's layers; its weights may be quantised, sliced, or not there at all."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    norms: list[str] = []
    transposed = False
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            linear[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linear[name] = (module.nx, module.nf)
            transposed = True
        elif "norm" in type(module).__name__.lower() and "weight" in dict(module.named_parameters(recurse=False)):
            norms.append(name)
    return ModelShape(
        family=str(model.config.model_type),
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        linear=linear,
        norms=tuple(norms),
        transposed=transposed,
    )
