"""Full fine-tuning of some layers only."""

from typing import TYPE_CHECKING

from torch import nn

from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_layers(model: "PreTrainedModel", layers: str | None) -> None:
    """Leave decoder layers out of training.

    Args:
        layers: numbers and ranges, such as `0-11,14`; None freezes nothing.

    Raises:
        InputError: the model has no such layers.
    """
    if layers is None:
        return
    blocks = _decoder_layers(model)
    chosen = {number for part in layers.split(",") for number in _numbers(part)}
    if max(chosen) >= len(blocks):
        raise UserError(
            f"the model's layers are 0 to {len(blocks) - 1}, and {max(chosen)} is none of them",
            where="model.freeze_layers",
        )
    for number in chosen:
        blocks[number].requires_grad_(False)


def _numbers(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The list of decoder layers: the one whose length the config tells."""
    count = int(model.config.get_text_config().num_hidden_layers)
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UserError("the model's layers are not a list that can be counted", where="model.freeze_layers")
    return found[0]
