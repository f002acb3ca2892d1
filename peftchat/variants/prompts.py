"""Variants that leave the weights alone and train what stands before every prompt."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftchat.variants.base import AdapterSection, ModelShape, Paper, Setting, Variant

if TYPE_CHECKING:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

_ONCE = "the trained vectors stand once before a row, and only its first conversation would see them"
_SHARDED = "PEFT writes its file from the process's own slice of the vectors, which ZeRO-3 leaves empty (read, not run)"
_INSTEAD = "Keep base and adapter side by side: `peftchat chat RUN` and stock peft load them."


class PromptTuningSection(AdapterSection):
    """Settings of prompt tuning."""

    variant: Literal["prompt_tuning"] = "prompt_tuning"
    virtual_tokens: int = Field(20, ge=1, description="Trained vectors before each conversation.")


class PTuningSection(AdapterSection):
    """Settings of P-tuning."""

    variant: Literal["p_tuning"] = "p_tuning"
    virtual_tokens: int = Field(20, ge=1, description="Trained vectors before each conversation.")
    encoder_hidden: int = Field(128, ge=1, description="Width of the network that makes the vectors while training.")


class PrefixTuningSection(AdapterSection):
    """Settings of prefix tuning."""

    variant: Literal["prefix_tuning"] = "prefix_tuning"
    virtual_tokens: int = Field(
        20, ge=1, description="Trained keys and values before each conversation, in every layer."
    )


def _prompt_tuning(section: PromptTuningSection, facts: ModelShape) -> "PromptTuningConfig":
    from peft import PromptTuningConfig, PromptTuningInit

    return PromptTuningConfig(
        num_virtual_tokens=section.virtual_tokens, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
    )


def _p_tuning(section: PTuningSection, facts: ModelShape) -> "PromptEncoderConfig":
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(num_virtual_tokens=section.virtual_tokens, encoder_hidden_size=section.encoder_hidden)


def _prefix_tuning(section: PrefixTuningSection, facts: ModelShape) -> "PrefixTuningConfig":
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=section.virtual_tokens)


_REFUSES: dict[Setting, str] = {"packing": _ONCE, "zero3": _SHARDED}

PROMPT_TUNING = Variant(
    name="prompt_tuning",
    title="Prompt tuning",
    summary="Trains vectors that stand before each conversation like words of a prompt.",
    paper=Paper("Lester et al.", 2021, "2104.08691"),
    options=PromptTuningSection,
    build=_prompt_tuning,
    learning_rate=3e-2,
    proved=frozenset({"zero2"}),
    refuses=_REFUSES,
    folds=False,
    instead=_INSTEAD,
    vllm="no",
)

P_TUNING = Variant(
    name="p_tuning",
    title="P-tuning",
    summary="Prompt tuning whose vectors come out of a small trained network.",
    paper=Paper("Liu et al.", 2021, "2103.10385"),
    options=PTuningSection,
    build=_p_tuning,
    learning_rate=1e-2,
    refuses=_REFUSES,
    folds=False,
    instead=_INSTEAD,
    vllm="no",
)

PREFIX_TUNING = Variant(
    name="prefix_tuning",
    title="Prefix tuning",
    summary="Trains keys and values that stand before those of each conversation, in every layer.",
    paper=Paper("Li and Liang", 2021, "2101.00190"),
    options=PrefixTuningSection,
    build=_prefix_tuning,
    learning_rate=3e-2,
    refuses={
        **_REFUSES,
        "checkpointing": "PEFT refuses it: recomputing a layer would lose the trained keys and values",
    },
    folds=False,
    instead=_INSTEAD,
    vllm="no",
)

VARIANTS = (PROMPT_TUNING, P_TUNING, PREFIX_TUNING)
