"""LoRA and its closest relatives: the same two thin matrices, with another scale, split or learning rate."""

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftchat.errors import UserError
from peftchat.variants.base import (
    Dropout,
    Formerly,
    LowRankAdapter,
    NotInConfig,
    Paper,
    TrainerHooks,
    VllmSupport,
    incompatible,
)
from peftchat.variants.model_shape import ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class LoraAdapter(LowRankAdapter):
    """An adapter of PEFT's LoRA class.

    Attributes:
        changes_base: whether PEFT's initialization of this name changes the base's weights.
        recomputable: whether that change follows from the base's weights alone. If so, a stock PEFT adapter can be
            merged: the change is computed again.
    """

    changes_base: ClassVar[bool] = False
    recomputable: ClassVar[bool] = False
    peft_class = "LoraConfig"
    peft_alpha = "lora_alpha"
    peft_dropout = "lora_dropout"
    vllm: ClassVar[VllmSupport] = "adapter"
    supports_trainable_tokens = True
    no_experts_because = "its initialization reads the weight of a linear layer, which fused experts do not have"

    @property
    def update_scale(self) -> float:
        """The factor of the update `B A`."""
        return self.alpha / self.r


class DropoutLoraAdapter(LoraAdapter):
    """An adapter of PEFT's LoRA class that can drop inputs during training."""

    dropout: Dropout = 0.0

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LoraConfig.

        Raises:
            UserError: the recipe sets a dropout, and PEFT has none for experts.
        """
        settings = super().peft_settings(shape)
        if settings.get("target_parameters") and self.dropout:
            raise UserError(
                "PEFT adds the update to the weights of experts themselves, so no inputs can be dropped: "
                f"got {self.dropout:g}, expected 0",
                where=f"adapter.dropout: {self.dropout:g}",
                hint="Remove the key or set it to 0. With target_modules: attention the experts stay frozen, and "
                "dropout works.",
            )
        return settings


class Lora(DropoutLoraAdapter):
    """Adds to each target weight a product of two thin matrices, and trains only those."""

    title = "LoRA"
    paper = Paper("Hu et al.", 2021, "2106.09685")
    learning_rate = 2e-4
    auto_factor = 1.0
    tested_zero_stages = frozenset({"zero2", "zero3"})
    no_experts_because = ""

    variant: Literal["lora"] = "lora"
    init_lora_weights: Annotated[Literal["default", "gaussian", "orthogonal"], Formerly("init")] = Field(
        "default",
        description="Initial values of the matrix on the input side; the other one is zero. With `orthogonal` both "
        "are parts of a random rotation, and their product is zero.",
    )

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LoraConfig, where `True` is the default initialization."""
        chosen = True if self.init_lora_weights == "default" else self.init_lora_weights
        settings = {**super().peft_settings(shape), "init_lora_weights": chosen}
        if chosen == "orthogonal" and settings.get("target_parameters"):
            raise UserError(
                f"this initialization reads the weight of a linear layer, which the experts of a `{shape.model_type}` "
                "do not have",
                where="adapter.init_lora_weights: orthogonal",
                hint="Use `default` or `gaussian`. With target_modules: attention the experts stay frozen.",
            )
        return settings


class Rslora(DropoutLoraAdapter):
    """LoRA scaled by the square root of the rank, so that high ranks learn as fast as low ones."""

    title = "rsLoRA"
    paper = Paper("Kalajdzievski", 2023, "2312.03732")
    learning_rate = 1e-4
    auto_factor = 1.0  # Its scale, by which the rule divides, is why its own rate is lower.
    no_experts_because = ""

    variant: Literal["rslora"] = "rslora"

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LoraConfig with the other scale."""
        return {**super().peft_settings(shape), "use_rslora": True}

    @property
    def update_scale(self) -> float:
        """The factor of the update `B A`, which falls less with the rank."""
        return self.alpha / math.sqrt(self.r)


class Dora(DropoutLoraAdapter):
    """Trains the norm of each row of a weight apart from its direction, which a LoRA changes."""

    title = "DoRA"
    paper = Paper("Liu et al.", 2024, "2402.09353")
    learning_rate = 2e-4
    auto_factor = 1.0
    tested_zero_stages = frozenset({"zero3"})
    incompatible_with = incompatible(
        {"8 bits": "PEFT reads the scales of 8-bit weights before bitsandbytes has computed them"}
    )
    vllm = "merged"
    no_experts_because = "PEFT's wrapper of parameters has no DoRA"

    variant: Literal["dora"] = "dora"

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LoraConfig with trained norms."""
        return {**super().peft_settings(shape), "use_dora": True}


class LoraPlus(DropoutLoraAdapter):
    """LoRA with a higher learning rate for the matrices on the output side than for those on the input side."""

    title = "LoRA+"
    paper = Paper("Hayou et al.", 2024, "2402.12354")
    aliases = ("lora+",)
    learning_rate = 5e-5
    auto_factor = 0.25
    tested_zero_stages = frozenset({"zero2"})
    no_experts_because = ""

    variant: Literal["loraplus"] = "loraplus"
    loraplus_lr_ratio: Annotated[NotInConfig[float], Formerly("rate_ratio")] = Field(
        16.0,
        ge=1,
        description="Learning rate of the matrices on the output side, as a multiple of `training.learning_rate`.",
    )

    def trainer_hooks(self, model: "PeftModel | PreTrainedModel") -> TrainerHooks:
        """Return hooks that raise the learning rate of `lora_B`."""
        return LoraPlusHooks(self.loraplus_lr_ratio)


class LoraPlusHooks(TrainerHooks):
    """The learning rates of LoRA+."""

    def __init__(self, lr_ratio: float) -> None:
        self._lr_ratio = lr_ratio

    def lr_multiplier(self, parameter: str) -> float:
        """Return the ratio for matrices on the output side, 1 for the others."""
        return self._lr_ratio if ".lora_B." in parameter else 1.0
