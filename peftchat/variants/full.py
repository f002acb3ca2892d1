"""The two extremes: the embeddings of added tokens alone, and every weight."""

from typing import Literal

from peftchat.variants.base import Adapter, Variant, incompatible, unquantized_only


class TrainableTokens(Adapter):
    """Trains the embeddings of the chat template's added tokens and nothing else."""

    title = "Trainable tokens"
    learning_rate = 5e-3
    tested_zero_stages = frozenset({"zero3"})
    incompatible_with = incompatible(
        unquantized_only("transformers trains a quantized base only through an adapter in its layers")
    )
    supports_trainable_tokens = True
    peft_class = None

    variant: Literal["trainable_tokens"] = "trainable_tokens"


class Full(Variant):
    """Trains every weight (`method: full`), or those of some layers (`model.freeze_layers`)."""

    name = "full"
    title = "Full fine-tuning"
    learning_rate = 2e-5
    auto_factor = 0.1
    tested_zero_stages = frozenset({"zero3"})
    incompatible_with = incompatible(unquantized_only("quantized weights have no gradient"))
    mergeable = False
    unmergeable_because = "its run folder holds a complete model"
    merge_hint = "The run folder is a model already."
    vllm = "no"
