"""Learning rate by rule: `training.learning_rate: auto` from the model's width, the variant, its scale and the steps.

The rule for LoRA is a fit of sweeps over Llama 3 and Qwen models, with alpha 32 and the scale `alpha / r`:
https://tinker-docs.thinkingmachines.ai/supervised-learning/sl-hyperparams

A later sweep of its authors on a coarse grid finds best rates of single models within a factor of 4 of the rule:
https://github.com/thinking-machines-lab/tinker-cookbook/blob/main/tinker_cookbook/hyperparam_utils.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError
from peftchat.formatting import format_rate
from peftchat.models.source import ModelSource
from peftchat.variants import get_variant
from peftchat.variants.low_rank import LoraAdapter

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

SOURCE = "https://tinker-docs.thinkingmachines.ai/supervised-learning/sl-hyperparams"
"""Where the rule stands."""

_RATE = 5e-4
"""LoRA's rate at the reference width."""

_WIDTH = 2000

_LLAMA_EXPONENT = 0.781
_QWEN_EXPONENT = 0.0775

_FITTED_WIDTHS = (2048, 8192)
"""The narrowest and the widest Llama 3, between which the exponent was fitted."""

_ALPHA = 32
"""`r * scale` of the adapters that the rule was fitted with."""

_SHORT_STEPS = 100
_SHORT_FACTOR = 1.5
"""In runs of fewer steps LoRA's best rate is about 15 times that of full fine-tuning instead of 10 times:
https://thinkingmachines.ai/blog/lora/"""

_MAX_RATE = 1e-2
"""The highest rate that is chosen. For small widths and scales the rule alone gives rates at which Adam is unstable."""

_WIDTH_NAMES = ("hidden_size", "n_embd", "d_model", "n_embed", "model_dim", "dim")
"""What configs call the width of the residual stream."""


@dataclass(frozen=True, slots=True)
class ModelWidth:
    """What the rule needs of a model.

    Attributes:
        model_type: the architecture's name in transformers.
        size: width of the residual stream.
    """

    model_type: str
    size: int


@dataclass(frozen=True, slots=True)
class RuleRate:
    """A learning rate by the rule.

    Attributes:
        value: the rate, with two digits.
        reason: how it came about, in a few words.
    """

    value: float
    reason: str

    def __str__(self) -> str:
        return f"{format_rate(self.value)} ({self.reason})"


def width_of(config: Any) -> int | None:
    """Return the width of the residual stream that a transformers config states; None if it states none.

    In a config of several parts, it is the width of the part for text.
    """
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _WIDTH_NAMES)
    return next((one for one in found if isinstance(one, int) and not isinstance(one, bool) and one > 0), None)


def read_width(recipe: "Recipe") -> ModelWidth:
    """Read the width of a recipe's base from its config.

    Raises:
        UserError: the config cannot be loaded, or states no width.
    """
    config = ModelSource.of_recipe(recipe).config()
    size = width_of(config)
    if size is None:
        raise UserError(
            f"the config states no width ({', '.join(_WIDTH_NAMES[:3])}), and `training.learning_rate: auto` needs it",
            where=f"model.name: {recipe.model.name}",
            hint="Write a number, such as `--set training.learning_rate=2e-4`.",
        )
    return ModelWidth(str(config.get_text_config().model_type), size)


def rule_rate(recipe: "Recipe", width: Callable[["Recipe"], ModelWidth] = read_width) -> RuleRate:
    """Return the learning rate that the rule gives for a recipe; a variant without a rule has a rate of its own.

    Args:
        recipe: its rate does not count.
        width: how to find the width of its base; called where the rule needs it.

    Raises:
        UserError: the width cannot be read.
    """
    if recipe.has_pairs:
        return _pair_rate(recipe)
    variant = get_variant("full" if recipe.adapter is None else recipe.adapter.variant)
    if variant.auto_factor is None:
        reason = f"the rate of `{variant.name}` on every model: no rule by width is known for it"
        return RuleRate(variant.learning_rate, reason)
    value, reason = _lora_rate(width(recipe))
    if isinstance(recipe.adapter, LoraAdapter):
        value, reason = _adapted(value, reason, recipe.adapter, variant.auto_factor)
        if 0 < recipe.training.max_steps < _SHORT_STEPS:
            value *= _SHORT_FACTOR
            reason += f"; times {_SHORT_FACTOR}, as the run has fewer than {_SHORT_STEPS} steps"
    else:
        # The factor for short runs is one of LoRA's rate against this one.
        value *= variant.auto_factor
        reason = f"a tenth of LoRA's: {reason}"
    if value > _MAX_RATE:
        value, reason = _MAX_RATE, f"the highest rate that is chosen, as the rule gives {format_rate(value)}: {reason}"
    return RuleRate(float(f"{value:.1e}"), reason)


_PAIR_RATE = 1e-6
"""TRL's default for objectives with pairs, meant for full fine-tuning:
https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/dpo_config.py"""

_ADAPTER_FACTOR = 10
"""How much higher TRL's manual has it for adapters: https://huggingface.co/docs/trl/peft_integration"""


def _pair_rate(recipe: "Recipe") -> RuleRate:
    """Return the rate of an objective with pairs, which is far below that of fine-tuning, whatever the width."""
    reason = f"TRL's default for `{recipe.objective}`"
    if recipe.adapter is None:
        return RuleRate(_PAIR_RATE, reason)
    # Two digits, as of every rate: the product is 9.999999999999999e-06.
    rate = float(f"{_PAIR_RATE * _ADAPTER_FACTOR:.1e}")
    return RuleRate(rate, f"{reason}, times {_ADAPTER_FACTOR} for adapters")


def _lora_rate(width: ModelWidth) -> tuple[float, str]:
    """Return the rate of LoRA with alpha 32, and the formula."""
    is_qwen = "qwen" in width.model_type.lower()
    exponent = _QWEN_EXPONENT if is_qwen else _LLAMA_EXPONENT
    low, high = _FITTED_WIDTHS
    if is_qwen:
        basis = "fitted on Qwen"
    elif width.model_type == "llama" and low <= width.size <= high:
        basis = "fitted on Llama 3"
    else:
        what = "width" if width.model_type == "llama" else "architecture"
        basis = f"fitted on Llama 3, an extrapolation to this {what}"
    formula = f"{format_rate(_RATE)} x ({_WIDTH} / {width.size})^{exponent} by the width of the model, {basis}"
    return _RATE * (_WIDTH / width.size) ** exponent, formula


def _adapted(value: float, reason: str, adapter: LoraAdapter, factor: float) -> tuple[float, str]:
    """Return the rate for another scale and another variant of LoRA."""
    if factor != 1:
        value *= factor
        reason += f"; times {factor:g} for `{adapter.variant}`"
    scaled = _ALPHA / (adapter.r * adapter.update_scale)
    if scaled != 1:
        value *= scaled
        reason += f"; times {scaled:.3g} for the scale {adapter.update_scale:.3g} at rank {adapter.r}"
    return value, reason
