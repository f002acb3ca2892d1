"""Updates that are products of another shape than LoRA's: elementwise, Kronecker, blockwise, or normalized."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from peftchat.variants.base import (
    Dropout,
    Formerly,
    LowRankAdapter,
    Paper,
    TargetedAdapter,
    TypeSpecific,
    incompatible,
    unquantized_only,
)
from peftchat.variants.model_shape import ModelShape

_PACKED_SHAPE = "PEFT gives the update the shape of the packed weights, which differs from that of the layer"

RankDropout = Annotated[float, Field(ge=0, lt=1, description="Fraction of the update's rows dropped during training.")]
ModuleDropout = Annotated[
    float, Field(ge=0, lt=1, description="Fraction of layers whose update is dropped during training.")
]


class Loha(LowRankAdapter):
    """The elementwise product of two low-rank updates, whose rank can be the square of each."""

    title = "LoHa"
    paper = Paper("Hyeon-Woo et al.", 2021, "2108.06098")
    learning_rate = 1e-3
    incompatible_with = incompatible(
        unquantized_only(_PACKED_SHAPE), zero3="PEFT takes the layer's size from its weight, which ZeRO-3 partitions"
    )
    peft_class = "LoHaConfig"
    supports_conv1d = False

    variant: Literal["loha"] = "loha"
    rank_dropout: RankDropout = 0.0
    module_dropout: ModuleDropout = 0.0


class Lokr(LowRankAdapter):
    """An update that is a Kronecker product of a small matrix and a low-rank one."""

    title = "LoKr"
    paper = Paper("Yeh et al.", 2023, "2309.14859")
    learning_rate = 1e-3
    tested_zero_stages = frozenset({"zero3"})
    incompatible_with = incompatible(unquantized_only(_PACKED_SHAPE))
    peft_class = "LoKrConfig"
    supports_conv1d = False

    variant: Literal["lokr"] = "lokr"
    rank_dropout: RankDropout = 0.0
    module_dropout: ModuleDropout = 0.0
    decompose_both: bool = Field(False, description="Whether the smaller factor of the product is low-rank as well.")
    decompose_factor: int = Field(
        -1, ge=-1, description="How the sides are split between the two factors; -1 splits them most evenly."
    )

    def wrong_settings(self) -> Iterator[tuple[str, str]]:
        """Yield a factor of 0, by which no side can be split."""
        if self.decompose_factor == 0:
            yield "decompose_factor", "must be -1 or above 0, got 0"


class Gralora(LowRankAdapter):
    """A LoRA for each block of a weight, at the cost of one."""

    title = "GraLoRA"
    paper = Paper("Jung et al.", 2025, "2505.20355")
    learning_rate = 2e-4
    peft_class = "GraloraConfig"
    peft_dropout = "gralora_dropout"

    variant: Literal["gralora"] = "gralora"
    dropout: Dropout = 0.0
    gralora_k: Annotated[int, Formerly("blocks")] = Field(
        2, ge=1, description="Each weight is split into `gralora_k` times `gralora_k` blocks; it must divide `r`."
    )

    def wrong_settings(self) -> Iterator[tuple[str, str]]:
        """Yield a number of blocks among which the rank cannot be shared."""
        if self.r % self.gralora_k:
            yield "gralora_k", f"must divide `r` ({self.r}), got {self.gralora_k}"


class Hira(TargetedAdapter):
    """Multiplies each weight, element by element, by a low-rank factor, which makes an update of high rank."""

    title = "HiRA"
    paper = Paper("Huang et al.", 2025, None)
    learning_rate = 5e-3
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "HiraConfig"
    peft_dropout = "hira_dropout"

    variant: Literal["hira"] = "hira"
    r: TypeSpecific[int] = Field(32, ge=1, description="Rank of the factor that multiplies the weight.")
    dropout: Dropout = 0.0


class Delora(TargetedAdapter):
    """LoRA with normalized directions and one trained number per layer for the norm of the update."""

    title = "DeLoRA"
    paper = Paper("Bini et al.", 2025, "2503.18225")
    learning_rate = 1e-3
    incompatible_with = incompatible(
        unquantized_only("PEFT uses the norms of the packed numbers instead of the weights', and the loss is NaN"),
        zero3="PEFT computes the norms of the weights when it wraps them, of which ZeRO-3 shows a partition",
    )
    peft_class = "DeloraConfig"
    supports_conv1d = False

    variant: Literal["delora"] = "delora"
    r: TypeSpecific[int] = Field(8, ge=1, description="Rank of the update.")
    delora_lambda: TypeSpecific[int | None] = Field(
        None,
        ge=1,
        description="Initial norm of the update, in PEFT's unit; it is trained. Default: 2 for layers 4096 wide, 1 for "
        "narrow ones, so that the update begins at about a hundredth of the weight's norm.",
    )
    module_dropout: Dropout = 0.0

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of DeloraConfig, with a norm that suits the model's width.

        The first step, however small, gives the update its full norm, `lambda / sqrt(r * width)` of the weight's.
        Small models did not recover from a twelfth of the weight's norm.
        """
        default = max(1, round(math.sqrt(self.r * shape.hidden_size) / 96))
        return {**super().peft_settings(shape), "delora_lambda": self.delora_lambda or default}
