"""Parameter counts of a model and of its trainable part, from its config."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftchat.errors import UserError
from peftchat.models.added_tokens import find_added_tokens
from peftchat.models.peft_model import freeze_layers
from peftchat.planning.tracing import decoder_layers, decoder_linears, meta_model, wrap
from peftchat.training.hints import all_in_attention
from peftchat.training.rate_rule import width_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from peftchat.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Exact counts of a causal language model.

    Attributes:
        model_type: the config's `model_type`.
        num_layers: decoder blocks.
        hidden_size: width of the hidden states.
        intermediate_size: inner width of the MLP; 0 if the config names none.
        num_heads: query heads.
        num_key_value_heads: key and value heads.
        vocab_size: rows of the token embedding.
        max_positions: tokens of the longest sequence that the model takes.
        tied_head: whether the LM head is the embedding.
        embedding: weights of the token embedding.
        lm_head: weights of the LM head; 0 if it is tied.
        linear: weights of the linear layers in the blocks, which quantization applies to.
        linear_outputs: the sum of their output features.
        other: all other weights: norms, biases, positions.
        largest: elements of the largest parameter.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_positions: int
    tied_head: bool
    embedding: int
    lm_head: int
    linear: int
    linear_outputs: int
    other: int
    largest: int

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        return self.embedding + self.lm_head + self.linear + self.other

    @property
    def lm_head_size(self) -> int:
        """Elements of the matrix that computes the logits, tied or not."""
        return self.embedding if self.tied_head else self.lm_head


@dataclass(frozen=True, slots=True)
class TrainableCounts:
    """The trainable parameters.

    Attributes:
        parameters: trainable weights of the adapter, or of the model itself.
        largest: elements of the largest parameter among them.
        new_token_parameters: trainable embeddings of added tokens beside a frozen model.
        attention_only: whether all trainable parameters of an adapter lie in attention.
    """

    parameters: int
    largest: int
    new_token_parameters: int
    attention_only: bool = False


def parameter_counts(config: "PretrainedConfig") -> ParameterCounts:
    """Count the parameters of the model that a config describes.

    Raises:
        UserError: no causal language model can be built from the config.
    """
    model = build_meta_model(config)
    text = config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    linears = [tuple(layer.weight.shape) for layer in decoder_linears(model)]
    linear = sum(math.prod(shape) for shape in linears)
    in_lm_head = 0 if tied else int(head.weight.numel())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return ParameterCounts(
        model_type=str(text.model_type),
        num_layers=int(text.num_hidden_layers),
        hidden_size=width_of(config) or int(embedding.weight.shape[1]),
        intermediate_size=int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 0),
        num_heads=int(text.num_attention_heads),
        num_key_value_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        vocab_size=int(embedding.weight.shape[0]),
        max_positions=int(getattr(text, "max_position_embeddings", None) or 2**20),
        tied_head=tied,
        embedding=embedding.weight.numel(),
        lm_head=in_lm_head,
        linear=linear,
        linear_outputs=sum(max(shape) for shape in linears),
        other=everything - embedding.weight.numel() - in_lm_head - linear,
        largest=max(parameter.numel() for parameter in model.parameters()),
    )


def trainable_counts(config: "PretrainedConfig", recipe: "Recipe", new_tokens: int) -> TrainableCounts:
    """Count what the recipe's method trains.

    PEFT's own adapter is built on the full model's shapes.

    Raises:
        UserError: the adapter does not fit the model.
    """
    model = build_meta_model(config)
    if recipe.method == "full":
        freeze_layers(model, recipe.model.freeze_layers)
        sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        return TrainableCounts(sum(sizes), max(sizes), 0)
    model.requires_grad_(False)
    trainable = {name: one for name, one in wrap(model, recipe, new_tokens).named_parameters() if one.requires_grad}
    added = find_added_tokens(model)
    added_ids = set() if added is None else {id(parameter) for parameter in added.parameters()}
    own = {name: parameter.numel() for name, parameter in trainable.items() if id(parameter) not in added_ids}
    new_tokens_size = sum(parameter.numel() for parameter in trainable.values()) - sum(own.values())
    return TrainableCounts(sum(own.values()), max(own.values(), default=0), new_tokens_size, all_in_attention(own))


def build_meta_model(config: "PretrainedConfig") -> "PreTrainedModel":
    """Build the model that a config describes on torch's `meta` device.

    Raises:
        UserError: no causal language model can be built from the config.
    """
    try:
        model = meta_model(config, torch.bfloat16)
        decoder_layers(model)
    except Exception as error:
        # Each architecture reports an invalid config in its own way.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no causal language model can be built from the config: {reason}",
            where=f"model.name: {config.name_or_path}",
            hint="Choose a causal language model.",
        ) from error
    return model
