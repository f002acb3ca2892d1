"""Mixtures of experts: the parameters that hold the experts, and the modules that choose among them.

Since version 5, transformers holds one layer of all experts of a block in one parameter, shape (experts, outputs,
inputs) or, in GPT-OSS, (experts, inputs, outputs). Such a parameter belongs to no linear layer, so PEFT's `all-linear`
does not see it: https://github.com/huggingface/peft/issues/3009
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from peftchat.models.zero import unsharded_shape
from peftchat.variants.model_shape import in_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ROUTER_NAMES = frozenset({"gate", "router", "gating", "wg"})
"""Names of the modules around what chooses among experts."""


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold one layer of all experts of a block, by dotted name."""
    return {name: value for name, value in _own_parameters(model) if len(unsharded_shape(value)) == 3}


def flat_expert_names(model: nn.Module) -> tuple[str, ...]:
    """Return the parameters that hold all experts of a block without a dimension for them."""
    return tuple(
        name for name, value in _own_parameters(model) if len(unsharded_shape(value)) == 2 and not name.endswith("bias")
    )


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in model.named_modules():
        if "expert" in type(module).__name__.lower() and not isinstance(module, nn.Linear):
            for name, value in module.named_parameters(recurse=False):
                yield f"{path}.{name}", value


def router_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the dotted names of the modules that choose among experts; none for a model without experts."""
    modules = dict(model.named_modules())
    blocks = {name.rpartition(".")[0] for name in modules if name.rpartition(".")[2] == "experts"}
    blocks |= {name.rpartition(".")[0] for name in {key.rpartition(".")[0] for key in expert_parameters(model)}}
    return tuple(
        name
        for name, module in modules.items()
        if "weight" in dict(module.named_parameters(recurse=False))
        and any(name.startswith(f"{block}.") and _chooses(name.removeprefix(f"{block}.")) for block in blocks)
    )


def _chooses(name: str) -> bool:
    """Return whether a module inside a block of experts chooses among them, by its name inside the block."""
    parts = name.split(".")
    return not in_attention(name) and any(part in _ROUTER_NAMES or part.endswith("_gate") for part in parts)


def names_peft_replaces(model_type: str) -> frozenset[str]:
    """Return the last parts of `target_modules` that PEFT replaces with fused experts for this architecture."""
    from peft.utils import transformers_weight_conversion as conversion

    base = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(base, ()))


_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names that configs have for the number of experts that a token passes."""


def active_shares(model: nn.Module, config: "PretrainedConfig") -> dict[int, float]:
    """Return the fraction of a parameter of experts, or of their adapter, that one token uses.

    Args:
        model: the model, wrapped by PEFT or not.
        config: its config.

    Returns:
        `id` of a parameter -> its fraction; parameters that every token uses are not in it.
    """
    from peft.tuners.lora.layer import ParamWrapper

    text = config.get_text_config()
    per_token = next((int(value) for name in _PER_TOKEN if (value := getattr(text, name, None))), None)
    if per_token is None:
        return {}
    counts = {id(value): unsharded_shape(value)[0] for value in expert_parameters(model).values()}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.num_experts > 1:
            matrices = (*module.lora_A.parameters(), *module.lora_B.parameters())
            counts |= {id(matrix): module.num_experts for matrix in matrices}
    return {key: min(1.0, per_token / count) for key, count in counts.items()}
