"""LoRA that begins at a place of its own, found in the base's weights or in the user's rows."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftchat.errors import UserError
from peftchat.variants.base import (
    DropoutSection,
    LowRankSection,
    ModelShape,
    Paper,
    Variant,
    requires_unquantized,
    targets,
)

if TYPE_CHECKING:
    from peft import LoraConfig

_TAKES_OUT = "its start is cut out of the base's full weights, which ZeRO-3 holds in slices"
_LOOKS = "its start is read from the base's full layers, which ZeRO-3 holds in slices"
_NEEDS_FLOATS = "its start is a decomposition of full-precision weights; a quantized base has none"


class PissaSection(LowRankSection):
    """Settings of PiSSA."""

    variant: Literal["pissa"] = "pissa"


class OloraSection(LowRankSection):
    """Settings of OLoRA."""

    variant: Literal["olora"] = "olora"


class EvaSection(DropoutSection):
    """Settings of EVA."""

    variant: Literal["eva"] = "eva"
    rho: float = Field(
        2.0, ge=1, description="How uneven the ranks may become: at most `rho * r` in a layer. 1 keeps all equal."
    )
    start_rows: int = Field(128, ge=1, description="Training rows that are read to find the start.")


class CordaSection(LowRankSection):
    """Settings of CorDA."""

    variant: Literal["corda"] = "corda"
    mode: Literal["ipm", "kpm"] = Field(
        "ipm",
        description="`ipm` begins at the directions that matter most for the rows, to learn them faster; `kpm` at "
        "those that matter least, to keep what the base knows.",
    )
    start_rows: int = Field(128, ge=1, description="Training rows that are read to find the start.")


class LoftqSection(LowRankSection):
    """Settings of LoftQ."""

    variant: Literal["loftq"] = "loftq"


class LoraGaSection(LowRankSection):
    """Settings of LoRA-GA."""

    variant: Literal["lora_ga"] = "lora_ga"
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = Field(
        "ArB2r", description="Which singular vectors of the gradient go to which of the two matrices."
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = Field(
        "stable", description="How the size of the start is chosen."
    )
    stable_gamma: int = Field(16, ge=1, description="Divisor of the size for `scale: stable`; larger starts smaller.")
    start_rows: int = Field(32, ge=1, description="Training rows whose gradient is taken to find the start.")


def _of_weights(section: LowRankSection, facts: ModelShape) -> "LoraConfig":
    _check_rank(section, facts, vectors=1)
    return _plain(section, facts)


def _of_gradients(section: LoraGaSection, facts: ModelShape) -> "LoraConfig":
    # One half of the vectors goes to one matrix, the other half to the other.
    _check_rank(section, facts, vectors=2)
    return _plain(section, facts)


def _check_rank(section: LowRankSection, facts: ModelShape, *, vectors: int) -> None:
    """Refuse a rank for which a layer has too few singular vectors."""
    most = min(min(shape) for shape in facts.shapes(section.target_modules)) // vectors
    if section.r > most:
        raise UserError(
            f"the start needs {vectors * section.r} singular vectors, and the smallest layer has {vectors * most}",
            where=f"adapter.r: {section.r}",
            hint=f"Use at most r: {most}, or other target_modules.",
        )


def _plain(section: LowRankSection, facts: ModelShape, **settings: Any) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
        **settings,
    )


def _eva(section: EvaSection, facts: ModelShape) -> "LoraConfig":
    from peft import EvaConfig

    eva = EvaConfig(rho=section.rho, use_label_mask=False)
    return _plain(section, facts, lora_dropout=section.dropout, init_lora_weights="eva", eva_config=eva)


PISSA = Variant(
    name="pissa",
    title="PiSSA",
    summary="LoRA that begins at the largest singular vectors of each weight and trains those.",
    paper=Paper("Meng et al.", 2024, "2404.02948"),
    options=PissaSection,
    build=_of_weights,
    learning_rate=1e-4,
    proved=frozenset({"zero2"}),
    refuses={**requires_unquantized(_NEEDS_FLOATS), "zero3": _TAKES_OUT},
    vllm="adapter",
    rows_inside=True,
    start="pissa",
)

OLORA = Variant(
    name="olora",
    title="OLoRA",
    summary="LoRA that begins at orthonormal factors (QR) of each weight.",
    paper=Paper("Büyükakyüz", 2024, "2406.01775"),
    options=OloraSection,
    build=_of_weights,
    learning_rate=1e-4,
    refuses={**requires_unquantized(_NEEDS_FLOATS), "zero3": _TAKES_OUT},
    vllm="adapter",
    rows_inside=True,
    start="olora",
)

EVA = Variant(
    name="eva",
    title="EVA",
    summary="LoRA that begins at the main directions of each layer's inputs on the rows, with rank where they need it.",
    paper=Paper("Paischer et al.", 2024, "2410.07170"),
    options=EvaSection,
    build=_eva,
    learning_rate=2e-4,
    refuses={"zero3": _LOOKS},
    rows_inside=True,
    start="eva",
    starts_on_data=True,
)

CORDA = Variant(
    name="corda",
    title="CorDA",
    summary="LoRA that begins at factors of each weight, oriented by the covariance of its inputs on the rows.",
    paper=Paper("Yang et al.", 2024, "2406.05223"),
    options=CordaSection,
    build=_of_weights,
    learning_rate=1e-4,
    refuses={**requires_unquantized(_NEEDS_FLOATS), "zero3": _TAKES_OUT},
    vllm="adapter",
    rows_inside=True,
    start="corda",
    starts_on_data=True,
)

LOFTQ = Variant(
    name="loftq",
    title="LoftQ",
    summary="LoRA on a 4-bit base that begins by undoing as much of the quantization's error as its rank can.",
    paper=Paper("Li et al.", 2023, "2310.08659"),
    options=LoftqSection,
    build=_of_weights,
    learning_rate=2e-4,
    refuses={
        "unquantized": "it makes up for the error of a quantized base, and an unquantized one has none",
        "8 bits": "PEFT compares the base's weights with their 4-bit form only",
        "zero3": _LOOKS,
    },
    vllm="adapter",
    rows_inside=True,
    start="loftq",
)

LORA_GA = Variant(
    name="lora_ga",
    title="LoRA-GA",
    summary="LoRA that begins so that its first step follows the gradient of full fine-tuning on the rows.",
    paper=Paper("Wang et al.", 2024, "2407.05000"),
    options=LoraGaSection,
    build=_of_gradients,
    learning_rate=5e-5,
    refuses={**requires_unquantized("its start needs the gradient of full-precision weights"), "zero3": _TAKES_OUT},
    vllm="adapter",
    rows_inside=True,
    start="lora_ga",
    starts_on_data=True,
    aliases=("lora-ga",),
)

VARIANTS = (PISSA, OLORA, EVA, CORDA, LOFTQ, LORA_GA)
