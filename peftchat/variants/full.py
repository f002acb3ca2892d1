"""The two ends: the rows of new tokens alone, and every weight."""

from typing import Literal

from peftchat.variants.base import AdapterSection, Variant

_NO_LAYERS = "transformers trains a quantized base only where an adapter sits in its layers"


class TrainableTokensSection(AdapterSection):
    """Trainable tokens take no settings."""

    variant: Literal["trainable_tokens"] = "trainable_tokens"


TRAINABLE_TOKENS = Variant(
    name="trainable_tokens",
    title="Trainable tokens",
    summary="Trains the embeddings of the chat format's new tokens and nothing else.",
    paper=None,
    options=TrainableTokensSection,
    build=None,
    learning_rate=5e-3,
    proved=frozenset({"zero3"}),
    refuses={"4 bits": _NO_LAYERS, "8 bits": _NO_LAYERS},
    rows_inside=True,
)

FULL = Variant(
    name="full",
    title="Full fine-tuning",
    summary="Trains every weight (`method: full`), or those of some layers (`model.freeze_layers`).",
    paper=None,
    options=None,
    build=None,
    learning_rate=2e-5,
    proved=frozenset({"zero3"}),
    refuses={
        "4 bits": "quantized weights have no gradient",
        "8 bits": "quantized weights have no gradient",
    },
    folds=False,
    instead="The run folder is a model already.",
    vllm="no",
)

VARIANTS = (TRAINABLE_TOKENS, FULL)
