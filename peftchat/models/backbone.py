"""The part of a causal language model below its head."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def backbone_of(model: "PreTrainedModel") -> Any:
    """Return the module that makes hidden states of ids.

    The class of Llama 4 names a part that its text model does not have, and `base_model` is then the model itself:
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/llama4/modeling_llama4.py
    """
    return model.base_model if model.base_model is not model else model.get_submodule("model")
