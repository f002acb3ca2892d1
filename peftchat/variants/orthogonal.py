"""Variants that turn the weights or the outputs instead of adding to them."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftchat.variants.base import (
    ModelShape,
    Paper,
    TargetedSection,
    Variant,
    largest_divisor,
    requires_unquantized,
    targets,
    type_specific,
)

if TYPE_CHECKING:
    from peft import BOFTConfig, HRAConfig, OFTConfig, RoadConfig


class OftSection(TargetedSection):
    """Settings of OFT."""

    variant: Literal["oft"] = "oft"
    block_size: int | None = Field(
        None,
        ge=2,
        description="Side of the rotations on the diagonal; it has to divide all inputs. Without it: the largest "
        "such number up to 32.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of rotations left out while training.")


class BoftSection(TargetedSection):
    """Settings of BOFT."""

    variant: Literal["boft"] = "boft"
    block_size: int | None = Field(
        None,
        ge=2,
        description="Side of the rotations on the diagonal; it has to divide all inputs. Without it: the largest "
        "such number up to 8.",
    )
    factors: int = Field(1, ge=1, description="Factors of the butterfly. More mix more, and cost more.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of rotations left out while training.")


class HraSection(TargetedSection):
    """Settings of HRA."""

    variant: Literal["hra"] = "hra"
    r: int = type_specific(
        8, "Number of reflections; an even number makes them begin as the identity.", ge=2, multiple_of=2
    )


class RoadSection(TargetedSection):
    """Settings of RoAd."""

    variant: Literal["road"] = "road"
    form: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1", description="How many numbers a pair of outputs has of its own: one angle and length, two, or four."
    )
    group_size: int | None = Field(
        None,
        ge=2,
        description="How outputs are paired, an even number that divides all outputs. Without it: the largest such "
        "number up to 64.",
    )


def _oft(section: OftSection, facts: ModelShape) -> "OFTConfig":
    from peft import OFTConfig

    size = section.block_size or largest_divisor(_inputs(section, facts), 32)
    return OFTConfig(
        r=0,
        oft_block_size=size,
        module_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _boft(section: BoftSection, facts: ModelShape) -> "BOFTConfig":
    from peft import BOFTConfig

    size = section.block_size or largest_divisor(_inputs(section, facts), 8)
    return BOFTConfig(
        boft_block_size=size,
        boft_n_butterfly_factor=section.factors,
        boft_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _inputs(section: TargetedSection, facts: ModelShape) -> list[int]:
    return [inputs for inputs, _ in facts.shapes(section.target_modules)]


def _hra(section: HraSection, facts: ModelShape) -> "HRAConfig":
    from peft import HRAConfig

    return HRAConfig(r=section.r, target_modules=targets(section, facts))


def _road(section: RoadSection, facts: ModelShape) -> "RoadConfig":
    from peft import RoadConfig

    outputs = [outputs for _, outputs in facts.shapes(section.target_modules)]
    half = largest_divisor([size // 2 for size in outputs], 32)
    return RoadConfig(
        variant=section.form,
        group_size=section.group_size or 2 * half,
        target_modules=targets(section, facts),
    )


OFT = Variant(
    name="oft",
    title="OFT",
    summary="Turns each weight by trained rotations on blocks of its inputs, which keeps angles between neurons.",
    paper=Paper("Qiu et al.", 2023, "2306.07280"),
    options=OftSection,
    build=_oft,
    learning_rate=5e-4,
    proved=frozenset({"zero3"}),
)

BOFT = Variant(
    name="boft",
    title="BOFT",
    summary="OFT whose rotation is a product of sparse ones in butterfly order, so that all inputs can mix.",
    paper=Paper("Liu et al.", 2023, "2311.06243"),
    options=BoftSection,
    build=_boft,
    learning_rate=1e-3,
    proved=frozenset({"zero3"}),
)

HRA = Variant(
    name="hra",
    title="HRA",
    summary="Turns each weight by a chain of trained Householder reflections.",
    paper=Paper("Yuan et al.", 2024, "2405.17484"),
    options=HraSection,
    build=_hra,
    learning_rate=1e-3,
    proved=frozenset({"zero3"}),
    refuses=requires_unquantized("PEFT multiplies the packed numbers as if they were the weights"),
)

ROAD = Variant(
    name="road",
    title="RoAd",
    summary="Turns and stretches pairs of each layer's outputs by trained angles and lengths.",
    paper=Paper("Liao and Monz", 2024, "2409.00119"),
    options=RoadSection,
    build=_road,
    learning_rate=1e-2,
    proved=frozenset({"zero3"}),
)

VARIANTS = (OFT, BOFT, HRA, ROAD)
