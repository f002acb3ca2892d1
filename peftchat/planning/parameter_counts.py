"""What a config alone says about a model: its parameters by part, and how many of them are trained."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftchat.models.added_tokens import find_added_tokens
from peftchat.models.peft_model import freeze_layers
from peftchat.planning.tracing import decoder_linears, meta_model, wrap

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftchat.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Exact counts of a causal language model.

    Attributes:
        family: the config's `model_type`.
        layers: number of blocks.
        hidden: width of the residual stream.
        intermediate: inner width of the feed-forward part, 0 where the config names none.
        heads: query heads.
        key_value_heads: heads of keys and values.
        vocabulary: rows of the embedding.
        positions: tokens of the longest row that the model takes.
        tied: whether the head is the embedding.
        embedding: weights of the token embedding.
        head: weights of the output head; 0 where it is tied.
        linear: weights of the linear layers in the blocks: those that quantization packs.
        linear_rows: their output features, summed.
        other: everything else (norms, biases, positions).
        largest: elements of the largest parameter.
        parameters: all of them.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    positions: int
    tied: bool
    embedding: int
    head: int
    linear: int
    linear_rows: int
    other: int
    largest: int

    @property
    def parameters(self) -> int:
        """All weights, a tied head counted once."""
        return self.embedding + self.head + self.linear + self.other

    @property
    def head_size(self) -> int:
        """Elements of the matrix that makes the logits."""
        return self.embedding if self.tied else self.head


@dataclass(frozen=True, slots=True)
class TrainableCounts:
    """What is trained.

    Attributes:
        parameters: trained weights, of the adapter or of the model itself.
        largest: elements of the largest of them.
        rows: trained elements of new tokens' rows beside a frozen model.
    """

    parameters: int
    largest: int
    rows: int


def parameter_counts(config: "PretrainedConfig") -> ParameterCounts:
    """The counts of the model that a config describes."""
    model = meta_model(config, torch.bfloat16)
    text = config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    linears = [tuple(layer.weight.shape) for layer in decoder_linears(model)]
    linear = sum(math.prod(shape) for shape in linears)
    in_head = 0 if tied else int(head.weight.numel())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return ParameterCounts(
        family=str(text.model_type),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 0),
        heads=int(text.num_attention_heads),
        key_value_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        vocabulary=int(embedding.weight.shape[0]),
        positions=int(getattr(text, "max_position_embeddings", None) or 2**20),
        tied=tied,
        embedding=embedding.weight.numel(),
        head=in_head,
        linear=linear,
        linear_rows=sum(max(shape) for shape in linears),
        other=everything - embedding.weight.numel() - in_head - linear,
        largest=max(parameter.numel() for parameter in model.parameters()),
    )


def trainable_counts(config: "PretrainedConfig", recipe: "Recipe", new_tokens: int) -> TrainableCounts:
    """What the recipe's method trains, counted on the shapes of the whole model; adapters are PEFT's own.

    Raises:
        UserError: the adapter does not fit the model.
    """
    model = meta_model(config, torch.bfloat16)
    if recipe.method == "full":
        freeze_layers(model, recipe.model.freeze_layers)
        sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        return TrainableCounts(sum(sizes), max(sizes), 0)
    model.requires_grad_(False)
    trained = [parameter for parameter in wrap(model, recipe, new_tokens).parameters() if parameter.requires_grad]
    rows = find_added_tokens(model)
    own = set() if rows is None else {id(parameter) for parameter in rows.parameters()}
    sizes = [parameter.numel() for parameter in trained if id(parameter) not in own]
    return TrainableCounts(sum(sizes), max(sizes, default=0), sum(p.numel() for p in trained) - sum(sizes))
