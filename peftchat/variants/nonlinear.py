"""Updates that are no fixed linear map: routed by the input, or a small network of the weight itself."""

from typing import Literal

from pydantic import Field

from peftchat.variants.base import Paper, TargetedAdapter, TypeSpecific, incompatible, unquantized_only


class Lily(TargetedAdapter):
    """LoRA with input-side matrices that neighboring layers share, and output-side ones that a router mixes."""

    title = "Lily"
    paper = Paper("Zhong et al.", 2024, "2407.09946")
    learning_rate = 1e-3
    mergeable = False
    unmergeable_because = "what it adds depends on the input, so no fixed weights do the same"
    merge_hint = "Keep base and adapter side by side: `peftchat chat RUN` and stock PEFT load them."
    vllm = "no"
    peft_class = "LilyConfig"
    supports_conv1d = False

    variant: Literal["lily"] = "lily"
    r: TypeSpecific[int] = Field(32, ge=1, description="Rank of the update; the paper uses 2 to 4 times that of LoRA.")
    stride_A: int = Field(  # noqa: N815
        2, ge=1, description="Consecutive layers that share one matrix on the input side."
    )
    num_B: int = Field(  # noqa: N815
        4, ge=2, description="Matrices on the output side that the router mixes; all layers share them."
    )
    scaling: TypeSpecific[float] = Field(1.0, gt=0, description="Scale of the update.")


class Peanut(TargetedAdapter):
    """An update that a small network computes from the weight itself."""

    title = "PEANuT"
    paper = Paper("Zhong et al.", 2024, "2410.01870")
    learning_rate = 2e-4
    incompatible_with = incompatible(
        unquantized_only("its network reads the base's full-precision weights"),
        zero3="its network reads the layer's weight, which ZeRO-3 partitions (read, not run)",
    )
    peft_class = "PeanutConfig"
    supports_conv1d = False

    variant: Literal["peanut"] = "peanut"
    r: TypeSpecific[int] = Field(32, ge=1, description="Width of the network.")
    depth: int = Field(0, ge=0, description="Hidden layers on each side of the network.")
    act_fn: str = Field("relu", description="Activation between its layers, by transformers' name.")
    scaling: TypeSpecific[float] = Field(1.0, gt=0, description="Scale of the update.")
