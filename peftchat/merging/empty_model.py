"""An empty model: every module, no weights.

PEFT decides by names, shapes and types which modules an adapter changes and how. It gets a real transformers model for
that, whose matrices are views of a single zero: full shape, no memory. The meta device would not do: PEFT would move
the adapter's own weights and index buffers there too, and lose them.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftchat.errors import UserError, first_line


@dataclass(frozen=True)
class ParameterSlot:
    """Access to one parameter, which stays valid while PEFT wraps the module in its own layers."""

    owner: nn.Module
    attribute: str
    shape: torch.Size

    def fill(self, value: torch.Tensor) -> None:
        """Set the parameter to a real weight."""
        self.owner._parameters[self.attribute] = nn.Parameter(value, requires_grad=False)

    def empty(self) -> None:
        """Set the parameter back to zeros without memory."""
        self.fill(_zeros(self.shape, torch.float32))

    def value(self) -> torch.Tensor:
        """Return the parameter's current weight."""
        return self.owner.get_parameter(self.attribute).data


@dataclass(frozen=True)
class EmptyModel:
    """A causal model without weights.

    Attributes:
        model: the transformers model; PEFT may wrap its modules in place.
        slots: parameter name, as in the model before PEFT -> access to the parameter.
        ties: tied name -> the name whose weight it shares; both have a slot.
    """

    model: Any
    slots: dict[str, ParameterSlot]
    ties: dict[str, str]

    def within(self, path: str) -> dict[str, ParameterSlot]:
        """Return the parameters inside the module at `path`, tied ones included."""
        return {name: slot for name, slot in self.slots.items() if name.startswith(f"{path}.")}


def build_empty_model(config: Any, *, vocabulary_size: int = 0, trust_remote_code: bool = False) -> EmptyModel:
    """Build the model of `config` in float32, without weights.

    Args:
        config: a transformers config; it is copied, and the copy gets the new vocabulary size.
        vocabulary_size: smallest number of embedding rows; 0 keeps the config's.
        trust_remote_code: as in transformers.

    Raises:
        UserError: transformers has no causal model for the config.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise UserError(f"transformers cannot build this model: {first_line(error)}") from error
    if vocabulary_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    ties = dict(model.all_tied_weights_keys)
    slots = {}
    for path, module in model.named_modules():
        for attribute, weight in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if weight is not None:
                module._parameters[attribute] = nn.Parameter(_zeros(weight.shape, torch.float32), requires_grad=False)
                slots[name] = ParameterSlot(module, attribute, weight.shape)
    for tied, source in ties.items():
        slots[tied].owner._parameters[slots[tied].attribute] = slots[source].owner._parameters[slots[source].attribute]
    model.eval()
    return EmptyModel(model, slots, ties)


def _zeros(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    # Vectors take memory: PEFT copies trained biases and norms into them in place.
    return torch.zeros((), dtype=dtype).expand(shape) if len(shape) > 1 else torch.zeros(shape, dtype=dtype)
