"""AdaLoRA: rank that moves between layers while training."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftchat.variants.base import ModelShape, Paper, TargetedSection, Variant, targets

if TYPE_CHECKING:
    from peft import AdaLoraConfig

_NO_GRADIENTS = "it ranks directions by their gradients after each step, and DeepSpeed has released them by then"


class AdaloraSection(TargetedSection):
    """Settings of AdaLoRA."""

    variant: Literal["adalora"] = "adalora"
    init_r: int = Field(12, ge=1, description="Rank of every layer at the start.")
    target_r: int = Field(8, ge=1, description="Mean rank of a layer at the end.")
    alpha: int = Field(32, ge=1, description="Scale of the update: `alpha` over the current rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")
    tinit: float = Field(0.1, ge=0, description="Steps before ranks begin to fall. Below 1 it is a share of all steps.")
    tfinal: float = Field(
        0.3, ge=0, description="Steps at the end in which ranks stay as they are. Below 1 it is a share of all steps."
    )
    interval: int = Field(1, ge=1, description="Steps between two changes of ranks.")
    orthogonality: float = Field(
        0.5, ge=0, description="Weight of the term in the loss that keeps the matrices orthogonal."
    )


def _build(section: AdaloraSection, facts: ModelShape) -> "AdaLoraConfig":
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=section.init_r,
        target_r=section.target_r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
        deltaT=section.interval,
        orth_reg_weight=section.orthogonality,
        # The schedule is set when the number of steps is known.
        total_step=1,
    )


ADALORA = Variant(
    name="adalora",
    title="AdaLoRA",
    summary="LoRA as a singular value decomposition that gives up its least important directions while training.",
    paper=Paper("Zhang et al.", 2023, "2303.10512"),
    options=AdaloraSection,
    build=_build,
    learning_rate=1e-3,
    refuses={"zero2": _NO_GRADIENTS, "zero3": _NO_GRADIENTS},
    rows_inside=True,
)

VARIANTS = (ADALORA,)
