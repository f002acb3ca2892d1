"""Variants that train a few of the base's own numbers, or scale them."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from peftchat.errors import UserError
from peftchat.variants.base import (
    NOT_INHERITED,
    AdapterSection,
    ModelShape,
    Paper,
    TargetedSection,
    Variant,
    in_attention,
    list_or,
    targets,
    type_specific,
)

if TYPE_CHECKING:
    from peft import IA3Config, LNTuningConfig, MissConfig, ShiraConfig

_KEYS_AND_VALUES = (
    "k_proj",
    "v_proj",
    "key",
    "value",
    "qkv",
    "c_attn",
    "query_key_value",
    "Wqkv",
    "qkv_proj",
    "kv_proj",
)


class Ia3Section(AdapterSection):
    """Settings of IA3."""

    variant: Literal["ia3"] = "ia3"
    target_modules: Annotated[Literal["auto"] | tuple[str, ...], BeforeValidator(list_or("auto"))] = Field(
        "auto",
        json_schema_extra={NOT_INHERITED: True},
        description="The layers that are scaled: `auto` (keys, values, and the second layer of the feed-forward "
        "network), or a list of module names.",
    )
    feedforward_modules: tuple[str, ...] | None = Field(
        None,
        description="Those of them whose inputs are scaled instead of their outputs. Without it: those in the "
        "feed-forward network.",
    )


class LnTuningSection(AdapterSection):
    """Settings of LN tuning."""

    variant: Literal["ln_tuning"] = "ln_tuning"
    target_modules: Annotated[Literal["auto"] | tuple[str, ...], BeforeValidator(list_or("auto"))] = Field(
        "auto",
        json_schema_extra={NOT_INHERITED: True},
        description="The layers that are trained: `auto` (all normalization layers), or a list of module names.",
    )


class ShiraSection(TargetedSection):
    """Settings of SHiRA."""

    variant: Literal["shira"] = "shira"
    r: int | None = type_specific(
        None,
        "Decides how many weights are trained: as many as a LoRA of this rank has. Without it: 32, or less where the "
        "smallest layer would be trained to more than a half.",
        ge=1,
    )


class MissSection(TargetedSection):
    """Settings of MiSS."""

    variant: Literal["miss"] = "miss"
    r: int | None = type_specific(
        None,
        "Rank of the update: the number of pieces that a layer's inputs are summed into. Without it: 64, or the inputs "
        "of the smallest layer.",
        ge=1,
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")


def _ia3(section: Ia3Section, facts: ModelShape) -> "IA3Config":
    from peft import IA3Config

    names = _ia3_targets(facts) if isinstance(section.target_modules, str) else list(section.target_modules)
    chosen = section.feedforward_modules
    forward = [name for name in names if _feeds_forward(name, facts)] if chosen is None else list(chosen)
    return IA3Config(target_modules=names, feedforward_modules=forward, fan_in_fan_out=facts.transposed)


def _ia3_targets(facts: ModelShape) -> list[str]:
    attention = [name for name in facts.endings("attention") if name.endswith(_KEYS_AND_VALUES)]
    second = {
        ".".join(name.split(".")[-2:])
        for name, (inputs, outputs) in facts.linear.items()
        # Layers outside the numbered blocks only change the width of the embeddings.
        if not in_attention(name) and outputs == facts.hidden != inputs and any(map(str.isdigit, name.split(".")))
    }
    if not attention and not second:
        raise UserError(
            f"keys, values and feed-forward layers of a {facts.family} are not known by name",
            where="adapter.target_modules",
            hint="Name the layers to be scaled.",
        )
    return [*attention, *sorted(second)]


def _feeds_forward(ending: str, facts: ModelShape) -> bool:
    return any(name.endswith(f".{ending}") and not in_attention(name) for name in facts.linear)


def _ln_tuning(section: LnTuningSection, facts: ModelShape) -> "LNTuningConfig":
    from peft import LNTuningConfig

    wanted = section.target_modules
    names = list(dict.fromkeys(_last(name) for name in facts.norms)) if isinstance(wanted, str) else list(wanted)
    if not names:
        raise UserError(
            "no normalization layer was found in the model",
            where="adapter.target_modules",
            hint="Name the layers to be trained.",
        )
    return LNTuningConfig(target_modules=names)


def _last(name: str) -> str:
    return name.split(".")[-1]


def _shira(section: ShiraSection, facts: ModelShape) -> "ShiraConfig":
    from peft import ShiraConfig

    most = min(inputs * outputs // (2 * (inputs + outputs)) for inputs, outputs in facts.shapes(section.target_modules))
    # A seed in the file lets the positions be drawn again; without one PEFT stores them all the same.
    return ShiraConfig(
        r=section.r or max(1, min(32, most)),
        random_seed=0,
        target_modules=targets(section, facts),
        fan_in_fan_out=facts.transposed,
    )


def _miss(section: MissSection, facts: ModelShape) -> "MissConfig":
    from peft import MissConfig

    most = min(inputs for inputs, _ in facts.shapes(section.target_modules))
    return MissConfig(
        r=section.r or min(64, most), miss_dropout=section.dropout, target_modules=targets(section, facts)
    )


IA3 = Variant(
    name="ia3",
    title="IA3",
    summary="Scales keys, values and feed-forward activations by trained vectors.",
    paper=Paper("Liu et al.", 2022, "2205.05638"),
    options=Ia3Section,
    build=_ia3,
    learning_rate=5e-3,
    proved=frozenset({"zero3"}),
)

LN_TUNING = Variant(
    name="ln_tuning",
    title="LN tuning",
    summary="Trains the weights of the normalization layers and nothing else.",
    paper=Paper("Zhao et al.", 2023, "2312.11420"),
    options=LnTuningSection,
    build=_ln_tuning,
    learning_rate=1e-3,
    refuses={"zero3": "PEFT copies the norms when it wraps them, of which ZeRO-3 has left empty slices"},
)

SHIRA = Variant(
    name="shira",
    title="SHiRA",
    summary="Trains a fixed sparse choice of each weight's own entries.",
    paper=Paper("Bhardwaj et al.", 2024, "2406.13175"),
    options=ShiraSection,
    build=_shira,
    learning_rate=1e-3,
    proved=frozenset({"zero3"}),
)

MISS = Variant(
    name="miss",
    title="MiSS",
    summary="Adds one trained matrix that is repeated over slices of each layer's inputs (once known as Bone).",
    paper=Paper("Kang and Yin", 2024, "2409.15371"),
    options=MissSection,
    build=_miss,
    learning_rate=2e-4,
    proved=frozenset({"zero3"}),
    aliases=("bone",),
)

VARIANTS = (IA3, LN_TUNING, SHIRA, MISS)
