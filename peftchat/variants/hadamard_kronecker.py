"""Updates that are products of another shape than LoRA's."""

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftchat.variants.base import (
    DropoutSection,
    LowRankSection,
    ModelShape,
    Paper,
    TargetedSection,
    Variant,
    requires_unquantized,
    targets,
    type_specific,
)

if TYPE_CHECKING:
    from peft import DeloraConfig, GraloraConfig, HiraConfig, LoHaConfig, LoKrConfig


_SHAPE = "PEFT gives the update the shape of the packed weights, which is not that of the layer"


_NORMS = "PEFT takes the norms of the packed numbers for those of the weights, and the loss is NaN"
_NORMS_OF_SLICES = (
    "PEFT takes the norms of the weights when it wraps them, of which ZeRO-3 shows slices; it learns wrongly"
)
_SLICED = "PEFT reads the layer's size off the weight, which ZeRO-3 holds in slices"


class LohaSection(LowRankSection):
    """Settings of LoHa."""

    variant: Literal["loha"] = "loha"
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the update's rows dropped while training.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Share of whole layers' updates dropped while training.")


class LokrSection(LowRankSection):
    """Settings of LoKr."""

    variant: Literal["lokr"] = "lokr"
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the update's rows dropped while training.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Share of whole layers' updates dropped while training.")
    decompose_both: bool = Field(False, description="Whether the smaller factor of the product is low-rank as well.")
    decompose_factor: int = Field(
        -1, ge=-1, description="How the sides are split between the two factors; -1 splits them most evenly."
    )


class GraloraSection(DropoutSection):
    """Settings of GraLoRA."""

    variant: Literal["gralora"] = "gralora"
    blocks: int = Field(2, ge=1, description="Each weight is cut into `blocks` times `blocks` parts; it divides `r`.")


class HiraSection(TargetedSection):
    """Settings of HiRA."""

    variant: Literal["hira"] = "hira"
    r: int = type_specific(32, "Rank of the factor that multiplies the weight.", ge=1)
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")


class DeloraSection(TargetedSection):
    """Settings of DeLoRA."""

    variant: Literal["delora"] = "delora"
    r: int = type_specific(8, "Rank of the update.", ge=1)
    delora_lambda: int | None = type_specific(
        None,
        "First length of the update, as PEFT counts it; it is trained. Without it: 2 for layers 4096 wide, 1 for "
        "narrow ones, so that the update begins at about a hundredth of the weight's length.",
        ge=1,
    )
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")


def _loha(section: LohaSection, facts: ModelShape) -> "LoHaConfig":
    from peft import LoHaConfig

    return LoHaConfig(
        r=section.r,
        alpha=section.alpha,
        rank_dropout=section.rank_dropout,
        module_dropout=section.module_dropout,
        target_modules=targets(section, facts),
    )


def _lokr(section: LokrSection, facts: ModelShape) -> "LoKrConfig":
    from peft import LoKrConfig

    return LoKrConfig(
        r=section.r,
        alpha=section.alpha,
        rank_dropout=section.rank_dropout,
        module_dropout=section.module_dropout,
        decompose_both=section.decompose_both,
        decompose_factor=section.decompose_factor,
        target_modules=targets(section, facts),
    )


def _gralora(section: GraloraSection, facts: ModelShape) -> "GraloraConfig":
    from peft import GraloraConfig

    return GraloraConfig(
        r=section.r,
        alpha=section.alpha,
        gralora_dropout=section.dropout,
        gralora_k=section.blocks,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _hira(section: HiraSection, facts: ModelShape) -> "HiraConfig":
    from peft import HiraConfig

    return HiraConfig(
        r=section.r,
        hira_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _delora(section: DeloraSection, facts: ModelShape) -> "DeloraConfig":
    from peft import DeloraConfig

    return DeloraConfig(
        r=section.r,
        # The first step, however small, gives the update its full length, lambda / sqrt(r * width) of the weight's.
        # From a twelfth of it, small models never came back.
        delora_lambda=section.delora_lambda or max(1, round(math.sqrt(section.r * facts.hidden) / 96)),
        module_dropout=section.module_dropout,
        target_modules=targets(section, facts),
    )


LOHA = Variant(
    name="loha",
    title="LoHa",
    summary="The elementwise product of two low-rank updates, whose rank can be the square of each.",
    paper=Paper("Hyeon-Woo et al.", 2021, "2108.06098"),
    options=LohaSection,
    build=_loha,
    learning_rate=1e-3,
    refuses={**requires_unquantized(_SHAPE), "zero3": _SLICED},
)

LOKR = Variant(
    name="lokr",
    title="LoKr",
    summary="An update that is a Kronecker product of a small matrix and a low-rank one.",
    paper=Paper("Yeh et al.", 2023, "2309.14859"),
    options=LokrSection,
    build=_lokr,
    learning_rate=1e-3,
    proved=frozenset({"zero3"}),
    refuses=requires_unquantized(_SHAPE),
)

GRALORA = Variant(
    name="gralora",
    title="GraLoRA",
    summary="A LoRA of its own for each block of a weight, at the cost of one.",
    paper=Paper("Jung et al.", 2025, "2505.20355"),
    options=GraloraSection,
    build=_gralora,
    learning_rate=2e-4,
)

HIRA = Variant(
    name="hira",
    title="HiRA",
    summary="Multiplies each weight, element by element, by a low-rank factor, which makes an update of high rank.",
    paper=Paper("Huang et al.", 2025, None),
    options=HiraSection,
    build=_hira,
    learning_rate=5e-3,
    proved=frozenset({"zero3"}),
)

DELORA = Variant(
    name="delora",
    title="DeLoRA",
    summary="LoRA whose directions are normalized and whose length is one trained number a layer.",
    paper=Paper("Bini et al.", 2025, "2503.18225"),
    options=DeloraSection,
    build=_delora,
    learning_rate=1e-3,
    refuses={**requires_unquantized(_NORMS), "zero3": _NORMS_OF_SLICES},
)

VARIANTS = (LOHA, LOKR, GRALORA, HIRA, DELORA)
