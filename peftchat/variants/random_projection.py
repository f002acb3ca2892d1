"""Updates made of fixed random matrices, or of few coefficients of a fixed transform."""

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
    from peft import (
        C3AConfig,
        FourierFTConfig,
        RandLoraConfig,
        TinyLoraConfig,
        UniLoraConfig,
        VBLoRAConfig,
        VeraConfig,
        WaveFTConfig,
    )


class VeraSection(TargetedSection):
    """Settings of VeRA."""

    variant: Literal["vera"] = "vera"
    r: int = type_specific(
        256, "Rank of the fixed random matrices. It costs time, and hardly any trained parameters.", ge=1
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")
    d_initial: float = Field(0.1, gt=0, description="First value of the trained vector between the two matrices.")


class RandloraSection(TargetedSection):
    """Settings of RandLoRA."""

    variant: Literal["randlora"] = "randlora"
    r: int = type_specific(32, "Rank of each fixed random pair; a layer has as many pairs as full rank takes.", ge=1)
    alpha: int = type_specific(640, "Scale of the update: `alpha / r`; its authors take 20 times `r`.", ge=1)
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")


class FourierftSection(TargetedSection):
    """Settings of FourierFT."""

    variant: Literal["fourierft"] = "fourierft"
    n_frequency: int | None = type_specific(
        None,
        "Trained Fourier coefficients of each layer. Without it: 1000, or half the weights of the smallest layer.",
        ge=1,
    )
    scaling: float = type_specific(150.0, "Scale of the update.", gt=0)


class WaveftSection(TargetedSection):
    """Settings of WaveFT."""

    variant: Literal["waveft"] = "waveft"
    n_frequency: int | None = type_specific(
        None,
        "Trained wavelet coefficients of each layer. Without it: 2592, or half the weights of the smallest layer.",
        ge=1,
    )
    scaling: float = type_specific(25.0, "Scale of the update.", gt=0)


class C3aSection(TargetedSection):
    """Settings of C3A."""

    variant: Literal["c3a"] = "c3a"
    block_size: int | None = Field(
        None,
        ge=1,
        description="Side of the circulant blocks; it has to divide all inputs and outputs. Without it: the largest "
        "such number up to 256.",
    )


class TinyloraSection(TargetedSection):
    """Settings of TinyLoRA."""

    variant: Literal["tinylora"] = "tinylora"
    r: int = type_specific(2, "Singular directions of each weight that the update moves.", ge=1)
    u: int = Field(64, ge=1, description="Trained numbers of each layer.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")


class UniloraSection(TargetedSection):
    """Settings of Uni-LoRA."""

    variant: Literal["unilora"] = "unilora"
    r: int = type_specific(4, "Rank of the update of each layer.", ge=1)
    theta_d_length: int = Field(4096, ge=1, description="Trained numbers of the whole model.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")


class VbloraSection(TargetedSection):
    """Settings of VB-LoRA."""

    variant: Literal["vblora"] = "vblora"
    r: int = type_specific(4, "Rank of the update of each layer.", ge=1)
    num_vectors: int = Field(256, ge=1, description="Vectors in the bank that all layers share.")
    vector_length: int | None = Field(
        None,
        ge=1,
        description="Length of each vector; it has to divide all inputs and outputs. Without it: the largest such "
        "number up to 256.",
    )
    topk: int = Field(2, ge=1, description="Vectors of the bank that make up each piece of an update.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")


def _vera(section: VeraSection, facts: ModelShape) -> "VeraConfig":
    from peft import VeraConfig

    return VeraConfig(
        r=section.r,
        vera_dropout=section.dropout,
        d_initial=section.d_initial,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _randlora(section: RandloraSection, facts: ModelShape) -> "RandLoraConfig":
    from peft import RandLoraConfig

    return RandLoraConfig(
        r=section.r,
        randlora_alpha=section.alpha,
        randlora_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _fourierft(section: FourierftSection, facts: ModelShape) -> "FourierFTConfig":
    from peft import FourierFTConfig

    return FourierFTConfig(
        n_frequency=section.n_frequency or min(1000, _half_of_smallest(section, facts)),
        scaling=section.scaling,
        # PEFT's own start is random; at zero the first answers are the base's.
        init_weights=True,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _waveft(section: WaveftSection, facts: ModelShape) -> "WaveFTConfig":
    from peft import WaveFTConfig

    return WaveFTConfig(
        n_frequency=section.n_frequency or min(2592, _half_of_smallest(section, facts)),
        scaling=section.scaling,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _half_of_smallest(section: TargetedSection, facts: ModelShape) -> int:
    return min(inputs * outputs for inputs, outputs in facts.shapes(section.target_modules)) // 2


def _sides(section: TargetedSection, facts: ModelShape) -> list[int]:
    return [side for shape in facts.shapes(section.target_modules) for side in shape]


def _c3a(section: C3aSection, facts: ModelShape) -> "C3AConfig":
    from peft import C3AConfig

    size = section.block_size or largest_divisor(_sides(section, facts), 256)
    return C3AConfig(block_size=size, target_modules=targets(section, facts))


def _tinylora(section: TinyloraSection, facts: ModelShape) -> "TinyLoraConfig":
    from peft import TinyLoraConfig

    return TinyLoraConfig(
        r=section.r,
        u=section.u,
        tinylora_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _unilora(section: UniloraSection, facts: ModelShape) -> "UniLoraConfig":
    from peft import UniLoraConfig

    return UniLoraConfig(
        r=section.r,
        theta_d_length=section.theta_d_length,
        unilora_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _vblora(section: VbloraSection, facts: ModelShape) -> "VBLoRAConfig":
    from peft import VBLoRAConfig

    return VBLoRAConfig(
        r=section.r,
        num_vectors=section.num_vectors,
        vector_length=section.vector_length or largest_divisor(_sides(section, facts), 256),
        topk=section.topk,
        vblora_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


VERA = Variant(
    name="vera",
    title="VeRA",
    summary="Two fixed random matrices that all layers share; only two vectors of each layer are trained.",
    paper=Paper("Kopiczko et al.", 2023, "2310.11454"),
    options=VeraSection,
    build=_vera,
    learning_rate=5e-3,
    proved=frozenset({"zero2", "zero3"}),
)

RANDLORA = Variant(
    name="randlora",
    title="RandLoRA",
    summary="A full-rank update as a weighted sum of fixed random low-rank pairs; the weights are trained.",
    paper=Paper("Albert et al.", 2025, "2502.00987"),
    options=RandloraSection,
    build=_randlora,
    learning_rate=5e-4,
    proved=frozenset({"zero3"}),
)

FOURIERFT = Variant(
    name="fourierft",
    title="FourierFT",
    summary="Trains a few coefficients of the update's Fourier transform.",
    paper=Paper("Gao et al.", 2024, "2405.03003"),
    options=FourierftSection,
    build=_fourierft,
    learning_rate=5e-2,
)

WAVEFT = Variant(
    name="waveft",
    title="WaveFT",
    summary="Trains a few coefficients of the update's wavelet transform.",
    paper=Paper("Bilican et al.", 2025, "2505.12532"),
    options=WaveftSection,
    build=_waveft,
    learning_rate=5e-4,
)

C3A = Variant(
    name="c3a",
    title="C3A",
    summary="An update made of circulant blocks, each of which is one trained vector.",
    paper=Paper("Chen et al.", 2024, "2407.19342"),
    options=C3aSection,
    build=_c3a,
    learning_rate=1e-1,
    proved=frozenset({"zero3"}),
)

TINYLORA = Variant(
    name="tinylora",
    title="TinyLoRA",
    summary="Moves the main singular directions of each weight by a few trained numbers through a fixed projection.",
    paper=Paper("Morris et al.", 2026, "2602.04118"),
    options=TinyloraSection,
    build=_tinylora,
    learning_rate=1e-3,
    refuses=requires_unquantized("PEFT decomposes the packed numbers as if they were the weights"),
)

UNILORA = Variant(
    name="unilora",
    title="Uni-LoRA",
    summary="All LoRA matrices of the model are one trained vector, spread over them by a fixed projection.",
    paper=Paper("Li et al.", 2025, "2506.00799"),
    options=UniloraSection,
    build=_unilora,
    learning_rate=5e-3,
)

VBLORA = Variant(
    name="vblora",
    title="VB-LoRA",
    summary="LoRA matrices put together from a bank of vectors that all layers share.",
    paper=Paper("Li et al.", 2024, "2405.15179"),
    options=VbloraSection,
    build=_vblora,
    learning_rate=1e-3,
)

VARIANTS = (VERA, RANDLORA, FOURIERFT, WAVEFT, C3A, TINYLORA, UNILORA, VBLORA)
