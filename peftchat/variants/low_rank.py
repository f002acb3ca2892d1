"""LoRA and its closest relatives: the same two thin matrices, scaled, split or driven in another way."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftchat.variants.base import DropoutSection, ModelShape, Paper, Variant, targets

if TYPE_CHECKING:
    from peft import LoraConfig


class LoraSection(DropoutSection):
    """Settings of LoRA."""

    variant: Literal["lora"] = "lora"
    init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default",
        description="First values of the matrix on the input side; the other begins at zero (`orthogonal`: both are "
        "parts of a random rotation whose product is zero).",
    )


class RsloraSection(DropoutSection):
    """Settings of rank-stabilised LoRA."""

    variant: Literal["rslora"] = "rslora"


class DoraSection(DropoutSection):
    """Settings of DoRA."""

    variant: Literal["dora"] = "dora"


class LoraPlusSection(DropoutSection):
    """Settings of LoRA+."""

    variant: Literal["loraplus"] = "loraplus"
    rate_ratio: float = Field(
        16.0,
        ge=1,
        description="Learning rate of the matrices on the output side, as a multiple of `training.learning_rate`.",
    )


def lora_config(section: DropoutSection, facts: ModelShape, **settings: Any) -> "LoraConfig":
    """PEFT's config of a LoRA with these further settings."""
    from peft import LoraConfig

    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
        **settings,
    )


def _lora(section: LoraSection, facts: ModelShape) -> "LoraConfig":
    return lora_config(section, facts, init_lora_weights=True if section.init == "default" else section.init)


def _rslora(section: RsloraSection, facts: ModelShape) -> "LoraConfig":
    return lora_config(section, facts, use_rslora=True)


def _dora(section: DoraSection, facts: ModelShape) -> "LoraConfig":
    return lora_config(section, facts, use_dora=True)


def _loraplus(section: LoraPlusSection, facts: ModelShape) -> "LoraConfig":
    return lora_config(section, facts)


LORA = Variant(
    name="lora",
    title="LoRA",
    summary="Adds to each chosen weight a product of two thin matrices, which are all that is trained.",
    paper=Paper("Hu et al.", 2021, "2106.09685"),
    options=LoraSection,
    build=_lora,
    learning_rate=2e-4,
    proved=frozenset({"zero2", "zero3"}),
    vllm="adapter",
    rows_inside=True,
)

RSLORA = Variant(
    name="rslora",
    title="rsLoRA",
    summary="LoRA scaled by the square root of the rank, so that high ranks learn as fast as low ones.",
    paper=Paper("Kalajdzievski", 2023, "2312.03732"),
    options=RsloraSection,
    build=_rslora,
    learning_rate=1e-4,
    vllm="adapter",
    rows_inside=True,
)

DORA = Variant(
    name="dora",
    title="DoRA",
    summary="Trains the length of each weight's rows apart from their direction; the direction moves by a LoRA.",
    paper=Paper("Liu et al.", 2024, "2402.09353"),
    options=DoraSection,
    build=_dora,
    learning_rate=2e-4,
    proved=frozenset({"zero3"}),
    refuses={"8 bits": "PEFT asks for the scales of 8-bit weights before bitsandbytes has made them"},
    rows_inside=True,
)

LORAPLUS = Variant(
    name="loraplus",
    title="LoRA+",
    summary="LoRA whose output-side matrices learn at a higher rate than those on the input side.",
    paper=Paper("Hayou et al.", 2024, "2402.12354"),
    options=LoraPlusSection,
    build=_loraplus,
    learning_rate=5e-5,
    proved=frozenset({"zero2"}),
    vllm="adapter",
    rows_inside=True,
    aliases=("lora+",),
)

VARIANTS = (LORA, RSLORA, DORA, LORAPLUS)
