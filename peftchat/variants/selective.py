"""Variants that train a few of the base's own numbers, or scale them."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from peftchat.errors import UserError
from peftchat.strict_model import list_to_tuple
from peftchat.variants.base import (
    Adapter,
    Dropout,
    Paper,
    TargetedAdapter,
    TypeSpecific,
    incompatible,
    list_or,
    require_parameters,
)
from peftchat.variants.model_shape import ModelShape, in_attention

AutoModules = TypeSpecific[Annotated[Literal["auto"] | tuple[str, ...], BeforeValidator(list_or("auto"))]]

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


class Ia3(Adapter):
    """Scales keys, values and feed-forward activations by trained vectors."""

    title = "IA3"
    paper = Paper("Liu et al.", 2022, "2205.05638")
    learning_rate = 5e-3
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "IA3Config"

    variant: Literal["ia3"] = "ia3"
    target_modules: AutoModules = Field(
        "auto",
        description="The layers that are scaled: `auto` (keys, values, and the second layer of the feed-forward "
        "network), or a list of module names.",
    )
    feedforward_modules: Annotated[tuple[str, ...] | None, BeforeValidator(list_to_tuple)] = Field(
        None,
        description="The target modules whose inputs are scaled instead of their outputs. Default: those in the "
        "feed-forward network.",
    )

    def wrong_settings(self) -> Iterator[tuple[str, str]]:
        """Yield modules of the feed-forward network that are not among the given targets."""
        if isinstance(self.target_modules, str):
            return
        others = [name for name in self.feedforward_modules or () if name not in self.target_modules]
        if others:
            yield "feedforward_modules", f"`{others[0]}` is not in `target_modules`"

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of IA3Config, with the model's own module names."""
        targets = _ia3_targets(shape) if isinstance(self.target_modules, str) else list(self.target_modules)
        if self.feedforward_modules is None:
            feedforward = [name for name in targets if _is_feedforward(name, shape)]
        else:
            feedforward = list(self.feedforward_modules)
        return {"target_modules": targets, "feedforward_modules": feedforward}

    def check_shape(self, shape: ModelShape) -> None:
        """Refuse `auto` on a mixture of experts, whose feed-forward networks IA3 cannot scale.

        Raises:
            UserError: the reason.
        """
        if isinstance(self.target_modules, str) and shape.experts:
            require_parameters(self, shape, next(iter(shape.experts)))


def _ia3_targets(shape: ModelShape) -> list[str]:
    """Return the keys, the values and the second feed-forward layers of a model."""
    attention = [name for name in shape.target_module_names("attention") if name.endswith(_KEYS_AND_VALUES)]
    second = [
        name
        for name, (inputs, outputs) in shape.linear.items()
        # Layers outside the numbered blocks only change the width of the embeddings.
        if not in_attention(name) and outputs == shape.hidden_size != inputs and any(map(str.isdigit, name.split(".")))
    ]
    if not attention and not second:
        raise UserError(
            f"no layer of a `{shape.model_type}` has the name of a key, value or feed-forward layer",
            where="adapter.target_modules",
            hint="Name the layers to be scaled.",
        )
    return [*attention, *sorted(shape.short_names(second))]


def _is_feedforward(target: str, shape: ModelShape) -> bool:
    return any(name.endswith(f".{target}") and not in_attention(name) for name in shape.linear)


class LnTuning(Adapter):
    """Trains the weights of the normalization layers and nothing else."""

    title = "LN tuning"
    paper = Paper("Zhao et al.", 2023, "2312.11420")
    learning_rate = 1e-3
    incompatible_with = incompatible(
        zero3="PEFT copies the norms when it wraps them, when ZeRO-3 has left only empty partitions"
    )
    peft_class = "LNTuningConfig"

    variant: Literal["ln_tuning"] = "ln_tuning"
    target_modules: AutoModules = Field(
        "auto",
        description="The layers that are trained: `auto` (all normalization layers), or a list of module names.",
    )

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of LNTuningConfig, with the model's own module names."""
        chosen = self.target_modules
        names = shape.short_names(shape.norms, parts=1) if isinstance(chosen, str) else chosen
        if not names:
            raise UserError(
                "the model has no normalization layers with weights",
                where="adapter.target_modules",
                hint="Name the layers to be trained.",
            )
        return {"target_modules": list(dict.fromkeys(names))}


class Shira(TargetedAdapter):
    """Trains a fixed sparse selection of each weight's own entries."""

    title = "SHiRA"
    paper = Paper("Bhardwaj et al.", 2024, "2406.13175")
    learning_rate = 1e-3
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "ShiraConfig"
    supports_conv1d = False

    variant: Literal["shira"] = "shira"
    r: TypeSpecific[int | None] = Field(
        None,
        ge=1,
        description="Sets how many weights are trained: as many as a LoRA of this rank has. Default: 32, or less where "
        "more than half of the smallest layer would be trained.",
    )

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of ShiraConfig.

        A seed in the file lets PEFT draw the positions again; without one it stores them all the same.
        """
        sizes = shape.sizes(self.target_modules)
        largest = min(inputs * outputs // (2 * (inputs + outputs)) for inputs, outputs in sizes)
        return {**super().peft_settings(shape), "r": self.r or max(1, min(32, largest)), "random_seed": 0}


class Miss(TargetedAdapter):
    """Adds one trained matrix that is repeated over slices of each layer's inputs (formerly called Bone)."""

    title = "MiSS"
    paper = Paper("Kang and Yin", 2024, "2409.15371")
    aliases = ("bone",)
    learning_rate = 2e-4
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "MissConfig"
    peft_dropout = "miss_dropout"
    supports_conv1d = False

    variant: Literal["miss"] = "miss"
    r: TypeSpecific[int | None] = Field(
        None,
        ge=1,
        description="Rank of the update: the number of pieces that a layer's inputs are summed into. Default: 64, or "
        "the inputs of the smallest layer.",
    )
    dropout: Dropout = 0.0

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of MissConfig, with a rank that suits the model."""
        largest = min(inputs for inputs, _ in shape.sizes(self.target_modules))
        return {**super().peft_settings(shape), "r": self.r or min(64, largest)}
