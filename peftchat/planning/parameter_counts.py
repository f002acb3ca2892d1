"""Parameter counts of a model and of its trainable part, from its config."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftchat.errors import UserError
from peftchat.models.added_tokens import find_added_tokens
from peftchat.models.experts import active_shares, expert_parameters
from peftchat.models.peft_model import adapter_notes, freeze_layers, layer_as_parameter, model_shape, peft_config
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
        num_heads: query heads; 0 for a model without attention.
        num_key_value_heads: key and value heads.
        vocab_size: rows of the token embedding.
        max_positions: tokens of the longest sequence that the model takes.
        tied_head: whether the LM head is the embedding.
        embedding: weights of the token embedding.
        lm_head: weights of the LM head; 0 if it is tied.
        linear: weights of the linear layers in the blocks, which quantization applies to.
        linear_outputs: the sum of their output features.
        experts: weights of the fused experts, which quantization does not apply to.
        active_experts: those of them that one token uses.
        other: all other weights: norms, biases, positions, routers.
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
    experts: int
    active_experts: int
    other: int
    largest: int

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        return self.embedding + self.lm_head + self.linear + self.experts + self.other

    @property
    def active(self) -> int:
        """The weights that one token uses: all but those of the experts that it does not pass."""
        return self.parameters - self.experts + self.active_experts

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
        active: the trainable weights that one token uses.
        modules: name of each kind of trained module without its layer's number -> number of modules and weights.
        notes: what the recipe's default became on this model.
        quantizable: whether the base can be quantized under this adapter.
    """

    parameters: int
    largest: int
    new_token_parameters: int
    active: int
    modules: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quantizable: bool = True

    @property
    def attention_only(self) -> bool:
        """Whether all of them lie in attention."""
        return all_in_attention(self.modules)


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
    experts = list(expert_parameters(model).values())
    shares = active_shares(model, config)
    in_experts = sum(parameter.numel() for parameter in experts)
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    return ParameterCounts(
        model_type=str(text.model_type),
        num_layers=int(text.num_hidden_layers),
        hidden_size=width_of(config) or int(embedding.weight.shape[1]),
        intermediate_size=int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 0),
        num_heads=heads,
        num_key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        vocab_size=int(embedding.weight.shape[0]),
        max_positions=int(getattr(text, "max_position_embeddings", None) or 2**20),
        tied_head=tied,
        embedding=embedding.weight.numel(),
        lm_head=in_lm_head,
        linear=linear,
        linear_outputs=sum(max(shape) for shape in linears),
        experts=in_experts,
        active_experts=round(sum(parameter.numel() * shares.get(id(parameter), 1.0) for parameter in experts)),
        other=everything - embedding.weight.numel() - in_lm_head - linear - in_experts,
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
        return _count(model, [named for named in model.named_parameters() if named[1].requires_grad], config, ())
    model.requires_grad_(False)
    notes = adapter_notes(recipe, model)
    adapter = peft_config(recipe, model)
    quantizable = adapter is None or layer_as_parameter(adapter, model_shape(model)) is None
    wrapped = wrap(model, recipe, new_tokens)
    added = find_added_tokens(model)
    added_ids = set() if added is None else {id(parameter) for parameter in added.parameters()}
    trainable = [(name, parameter) for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    counts = _count(wrapped, [named for named in trainable if id(named[1]) not in added_ids], config, notes)
    every = sum(parameter.numel() for _, parameter in trainable)
    return replace(counts, new_token_parameters=every - counts.parameters, quantizable=quantizable)


def _count(
    model: nn.Module, trained: list[tuple[str, nn.Parameter]], config: "PretrainedConfig", notes: tuple[str, ...]
) -> TrainableCounts:
    """Count trained parameters of a model."""
    shares = active_shares(model, config)
    kinds: dict[str, dict[str, int]] = {}
    for name, parameter in trained:
        module, kind = _module_kind(name)
        modules = kinds.setdefault(kind, {})
        modules[module] = modules.get(module, 0) + parameter.numel()
    return TrainableCounts(
        parameters=sum(parameter.numel() for _, parameter in trained),
        largest=max((parameter.numel() for _, parameter in trained), default=0),
        new_token_parameters=0,
        active=round(sum(parameter.numel() * shares.get(id(parameter), 1.0) for _, parameter in trained)),
        modules={kind: (len(modules), sum(modules.values())) for kind, modules in kinds.items()},
        notes=notes,
    )


_PEFT_PARTS = re.compile(r"\.(base_layer|modules_to_save|default|ln_tuning_layers|[a-z]+_[A-Z]\b)")


def _module_kind(parameter: str) -> tuple[str, str]:
    """Return the module that a trained parameter belongs to, and its name behind the layer's number."""
    module = _PEFT_PARTS.split(parameter.removeprefix("base_model.model."), maxsplit=1)[0]
    if module == parameter:
        module = parameter.rpartition(".")[0]
    numbers = list(re.finditer(r"\.\d+\.", module))
    return module, module[numbers[0].end() :] if numbers else module


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
