"""The settings that memory depends on, gathered from a recipe and a place."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from peftchat.planning.activations import ActivationKey
from peftchat.planning.facts import NEW_TOKENS
from peftchat.planning.shadow import AttentionKind
from peftchat.training.distributed import is_sharded, weight_dtype

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.recipe.sections import Dtype, Method, Offload, Optimizer
    from peftchat.training.distributed import Strategy

Device = Literal["cuda", "cpu"]

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes an element of each dtype."""

USUAL_SUPERVISED = 0.65
"""Share of tokens with a target where the data was not read; chat data sets lie between 0.4 and 0.8."""

USUAL_DIALOGUE = 256
"""Tokens of a dialogue where the data was not read."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """One way to train a model.

    Attributes:
        method: what is trained.
        dtype: of the unquantised base.
        bits: 4 or 8 for a quantised base, None for 16 or 32 by `dtype`.
        double: whether the scales of 4-bit weights are quantised too.
        optimizer: transformers' name of it.
        strategy: what several processes share.
        processes: all of them, on all machines.
        offload: what DeepSpeed keeps in main memory.
        checkpointing: whether activations are computed again in the backward pass.
        batch: rows or packs in one forward pass of one process.
        length: tokens of a row or pack.
        accumulation: forward passes in an optimizer step.
        supervised: share of tokens with a target.
        attention: what kind of attention runs.
        dialogue: tokens of a usual dialogue.
        device: `cuda` or `cpu`.
        new_tokens: rows trained beside a frozen embedding.
    """

    method: "Method"
    dtype: "Dtype"
    bits: Literal[4, 8] | None
    double: bool
    optimizer: "Optimizer"
    strategy: "Strategy"
    processes: int
    offload: "Offload"
    checkpointing: bool
    batch: int
    length: int
    accumulation: int
    supervised: float
    attention: AttentionKind
    dialogue: int
    device: Device
    new_tokens: int

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed shards anything."""
        return is_sharded(self.strategy)

    @property
    def held(self) -> "Dtype":
        """The dtype of unquantised weights."""
        return weight_dtype(self.method, self.dtype, self.strategy)

    @property
    def targets(self) -> int:
        """Supervised positions of one forward pass."""
        return max(1, round(self.batch * self.length * self.supervised))

    @property
    def activation_key(self) -> ActivationKey:
        """What the trace of a step depends on."""
        return ActivationKey(
            held=self.held,
            # DeepSpeed casts the whole model instead.
            autocast=None if self.sharded or self.dtype == "float32" else self.dtype,
            trained=self.dtype if self.sharded and self.method != "full" else None,
            attention=self.attention,
            quantised=self.bits is not None,
            checkpointing=self.checkpointing,
            branches_at_once=self.method != "full" and self.strategy != "zero3",
            new_tokens=0 if self.method == "full" else self.new_tokens,
        )

    def with_changes(self, **changes: object) -> "PlanSettings":
        """The same settings but for these."""
        return replace(self, **changes)  # type: ignore[arg-type]


def plan_settings(
    recipe: "Recipe",
    *,
    strategy: "Strategy",
    processes: int,
    device: Device,
    attention: AttentionKind,
    longest: int | None = None,
    supervised: float | None = None,
    dialogue: int | None = None,
    new_tokens: int | None = None,
) -> PlanSettings:
    """The recipe's settings on a device.

    Args:
        attention: see `attention_kind`.
        longest: tokens of the longest row or pack, where the data was read; `data.max_length` without it.
        supervised: share of tokens with a target, where the data was read.
        dialogue: tokens of a usual dialogue, where the data was read.
        new_tokens: rows that the template adds, where the tokenizer was read.
    """
    training, quantization = recipe.training, recipe.quantization
    length = min(longest or recipe.data.max_length, recipe.data.max_length)
    multiple = recipe.data.pad_to_multiple_of or 1
    return PlanSettings(
        method=recipe.method,
        dtype=recipe.model.dtype,
        bits=None if quantization is None else quantization.bits,
        double=quantization is not None and quantization.bits == 4 and quantization.double,
        optimizer=training.optim,
        strategy=strategy,
        processes=processes,
        offload=recipe.distributed.offload,
        checkpointing=bool(training.gradient_checkpointing),
        batch=training.per_device_train_batch_size,
        length=length + -length % multiple,
        accumulation=training.gradient_accumulation_steps,
        supervised=USUAL_SUPERVISED if supervised is None else supervised,
        attention=attention,
        dialogue=dialogue or USUAL_DIALOGUE,
        device=device,
        new_tokens=NEW_TOKENS.get(recipe.chat.template, 0) if new_tokens is None else new_tokens,
    )


def attention_kind(recipe: "Recipe", device: Device) -> AttentionKind:
    """The kind of attention that the recipe runs with, as `peftchat.training.model` settles it."""
    wanted = recipe.model.attention
    if wanted == "eager":
        return "eager"
    if wanted.startswith("flash") or wanted == "flex_attention":
        return "fused"
    if wanted == "sdpa":
        return "masked"
    if device == "cuda":
        return "fused" if recipe.model.dtype != "float32" else "masked"
    return "fused"
