"""Variants that leave the weights alone and train vectors in front of every prompt."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftchat.errors import UserError
from peftchat.variants.base import Adapter, Formerly, Paper, incompatible
from peftchat.variants.model_shape import ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


class PromptAdapter(Adapter):
    """An adapter of trained vectors in front of the prompt."""

    incompatible_with = incompatible(
        packing="the trained vectors come once per pack, and only its first conversation would attend to them",
        zero3="PEFT saves the process's own partition of the vectors, which ZeRO-3 leaves empty (read, not run)",
    )
    mergeable = False
    unmergeable_because = "it trains vectors that are put before the prompt, not weights"
    merge_hint = "Keep base and adapter side by side: `peftchat chat RUN` and stock PEFT load them."
    vllm = "no"

    def load_adapter_state(self, model: "PeftModel", state: "dict[str, Tensor]") -> list[str]:
        """Put the vectors of an adapter's file into the model.

        PEFT loads them by themselves, and then names them as unexpected.
        """
        return [name for name in super().load_adapter_state(model, state) if name != "prompt_embeddings"]


VirtualTokens = Annotated[int, Formerly("virtual_tokens"), Field(ge=1)]


class PromptTuning(PromptAdapter):
    """Trains vectors that precede each conversation like the embeddings of a prompt."""

    title = "Prompt tuning"
    paper = Paper("Lester et al.", 2021, "2104.08691")
    learning_rate = 3e-2
    tested_zero_stages = frozenset({"zero2"})
    peft_class = "PromptTuningConfig"

    variant: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: VirtualTokens = Field(20, description="Trained vectors before each conversation.")

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of PromptTuningConfig: it starts from embeddings of random tokens."""
        return {**super().peft_settings(shape), "prompt_tuning_init": "SAMPLE_VOCAB"}


class PTuning(PromptAdapter):
    """Prompt tuning with vectors that a small trained network computes."""

    title = "P-tuning"
    paper = Paper("Liu et al.", 2021, "2103.10385")
    learning_rate = 1e-2
    peft_class = "PromptEncoderConfig"

    variant: Literal["p_tuning"] = "p_tuning"
    num_virtual_tokens: VirtualTokens = Field(20, description="Trained vectors before each conversation.")
    encoder_hidden_size: Annotated[int, Formerly("encoder_hidden")] = Field(
        128, ge=1, description="Hidden size of the network that computes the vectors during training."
    )

    def training_modules(self, model: "PeftModel") -> "dict[str, nn.Module]":
        """Return the network: an adapter's file holds the vectors that it computed."""
        return {"prompt_encoder": model.prompt_encoder}


class PrefixTuning(PromptAdapter):
    """Trains keys and values that precede those of each conversation, in every layer."""

    title = "Prefix tuning"
    paper = Paper("Li and Liang", 2021, "2101.00190")
    learning_rate = 3e-2
    incompatible_with = incompatible(
        PromptAdapter.incompatible_with,
        checkpointing="PEFT does not support it: recomputing a layer would lose the trained keys and values",
    )
    unmergeable_because = "it trains keys and values that are put before the prompt's, not weights"
    peft_class = "PrefixTuningConfig"

    variant: Literal["prefix_tuning"] = "prefix_tuning"
    num_virtual_tokens: VirtualTokens = Field(
        20, description="Trained keys and values before each conversation, in every layer."
    )

    def check_shape(self, shape: ModelShape) -> None:
        """Refuse DeepSeek's kind of attention, which keeps keys and values in another shape than PEFT makes them.

        Raises:
            UserError: the model has it.
        """
        compressed = next((name for name in shape.linear if name.endswith(".kv_a_proj_with_mqa")), None)
        if compressed is not None:
            raise UserError(
                f"`prefix_tuning` does not work with the latent attention of a `{shape.model_type}` (`{compressed}`): "
                "PEFT makes keys and values of another shape",
                where="adapter.variant: prefix_tuning",
                hint="Use another variant, such as `lora` or `prompt_tuning`.",
            )
