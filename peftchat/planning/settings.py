"""What a run works through: read from local data, else taken from the recipe's own numbers."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peftchat.chat_template.templates import added_token_count
from peftchat.errors import UserError
from peftchat.planning.hardware import Device, Hardware
from peftchat.training.distributed import is_sharded, weight_dtype

if TYPE_CHECKING:
    import numpy as np

    from peftchat.chat_template.chat_format import ChatFormat
    from peftchat.dataset.cache import EncodedSplit
    from peftchat.recipe import Recipe
    from peftchat.recipe.sections import Dtype, Method, Offload, Optimizer
    from peftchat.training.distributed import DistributedSetup, Strategy


AttentionKind = Literal["fused", "masked", "eager"]
"""`fused`: a kernel that keeps its inputs, its output and one number a query (Dao et al., 2022). `masked`: SDPA
with a mask of every pair of positions. `eager`: the scores of every pair are kept."""


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """All that the bytes of a step depend on beside batch and length.

    Attributes:
        held: dtype of the unquantized weights, as torch names it.
        autocast: dtype that products are cast to, None where nothing is cast.
        trained: dtype that trained weights are cast to before the step (DeepSpeed's), None for what PEFT makes them.
        attention: how attention is computed.
        quantized: whether frozen weights are packed.
        checkpointing: whether each block is computed again in the backward pass.
        branches_at_once: whether plain LoRA layers run as `peftchat.models.fused_lora` has them.
        new_tokens: rows trained beside a frozen embedding.
    """

    held: str
    autocast: str | None
    trained: str | None
    attention: AttentionKind
    quantized: bool
    checkpointing: bool
    branches_at_once: bool
    new_tokens: int


_READ_AT_MOST = 64_000_000
"""Bytes of data files that are encoded for a plan; larger sets count only if their rows are cached already."""


@dataclass(frozen=True, slots=True)
class DatasetSize:
    """The rows of a recipe.

    Attributes:
        sequences: rows or packs an epoch.
        tokens: tokens an epoch, padding not counted.
        longest: tokens of the longest row or pack.
        conversation: tokens of the conversation that a usual token belongs to.
        supervised: share of tokens with a target.
        new_tokens: rows that the template adds to this tokenizer.
    """

    sequences: int
    tokens: int
    longest: int
    conversation: int
    supervised: float
    new_tokens: int


def read_dataset_size(recipe: "Recipe") -> DatasetSize | str:
    """The recipe's rows where everything needed for them lies here, else the reason why they were not read."""
    if not Path(recipe.model.name).is_dir():
        return "the tokenizer is not in a local folder"
    from peftchat.conversations.readers import find_files

    try:
        files = [find_files(entry.path, entry.split) for entry in recipe.data.train]
        if any(found is None for found in files):
            return "the data is on a hub"
        if sum(file.stat().st_size for found in files for file in found or ()) > _READ_AT_MOST:
            return "the data is large"
        return _read(recipe)
    except UserError as error:
        return str(error)


def _read(recipe: "Recipe") -> DatasetSize:
    from peftchat.dataset.cache import load_splits
    from peftchat.training.model import chat_format

    chat = chat_format(recipe)
    return dataset_size_of(recipe, chat, load_splits(recipe, chat)["train"])


def dataset_size_of(recipe: "Recipe", chat: "ChatFormat", rows: "EncodedSplit") -> DatasetSize:
    """What the recipe makes of encoded rows.

    Args:
        chat: the tokenizer in the recipe's chat format.
        rows: those to train on, at least one.
    """
    import numpy as np

    lengths = np.asarray(rows.store.lengths)
    sequences = _sequences(recipe, lengths)
    return DatasetSize(
        sequences=len(sequences),
        tokens=int(lengths.sum()),
        longest=int(sequences.max()),
        conversation=math.ceil(float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())),
        supervised=rows.stats.supervised / rows.stats.tokens,
        new_tokens=len(chat.new_tokens),
    )


def _sequences(recipe: "Recipe", lengths: "np.ndarray") -> "np.ndarray":
    """Tokens of each row or pack."""
    import numpy as np

    from peftchat.dataset.packing import pack

    if not recipe.data.packing:
        return lengths
    packs = pack(lengths, recipe.data.max_length, recipe.training.seed)
    return np.array([lengths[group].sum() for group in packs])


def steps_of(recipe: "Recipe", workload: DatasetSize | None, settings: "PlanSettings") -> int | None:
    """Optimizer steps of the run; None where neither the recipe nor the data tells."""
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    if workload is None:
        return None
    return math.ceil(steps_per_epoch(workload, settings) * training.num_train_epochs)


def steps_per_epoch(workload: DatasetSize, settings: "PlanSettings") -> int:
    """Optimizer steps in which every row or pack is seen once, as the trainer will count them."""
    passes = math.ceil(workload.sequences / (settings.batch * settings.processes))
    return max(1, math.ceil(passes / settings.accumulation))


BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes an element of each dtype."""

USUAL_SUPERVISED = 0.65
"""Share of tokens with a target where the data was not read; chat data sets lie between 0.4 and 0.8."""

USUAL_CONVERSATION = 256
"""Tokens of a conversation where the data was not read."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """One way to train a model.

    Attributes:
        method: what is trained.
        dtype: of the unquantized base.
        bits: 4 or 8 for a quantized base, None for 16 or 32 by `dtype`.
        double: whether the scales of 4-bit weights are quantized too.
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
        conversation: tokens of a usual conversation.
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
    conversation: int
    device: Device
    new_tokens: int

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed shards anything."""
        return is_sharded(self.strategy)

    @property
    def held(self) -> "Dtype":
        """The dtype of unquantized weights."""
        return weight_dtype(self.method, self.dtype, self.strategy)

    @property
    def targets(self) -> int:
        """Supervised positions of one forward pass."""
        return max(1, round(self.batch * self.length * self.supervised))

    @property
    def activation_key(self) -> TraceConfig:
        """What the trace of a step depends on."""
        return TraceConfig(
            held=self.held,
            # DeepSpeed casts the whole model instead.
            autocast=None if self.sharded or self.dtype == "float32" else self.dtype,
            trained=self.dtype if self.sharded and self.method != "full" else None,
            attention=self.attention,
            quantized=self.bits is not None,
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
    conversation: int | None = None,
    new_tokens: int | None = None,
) -> PlanSettings:
    """The recipe's settings on a device.

    Args:
        attention: see `attention_kind`.
        longest: tokens of the longest row or pack, where the data was read; `data.max_length` without it.
        supervised: share of tokens with a target, where the data was read.
        conversation: tokens of a usual conversation, where the data was read.
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
        conversation=conversation or USUAL_CONVERSATION,
        device=device,
        new_tokens=added_token_count(recipe.chat.template) if new_tokens is None else new_tokens,
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


def settings_on(
    recipe: "Recipe", hardware: Hardware, workload: DatasetSize | None, placement: "DistributedSetup | None" = None
) -> PlanSettings:
    """The recipe's settings on a device.

    Args:
        hardware: the device, which need not be here.
        workload: the data, where it was read.
        placement: where a run takes place; without it, what training would make of that many such devices.
    """
    if placement is None:
        strategy, processes = _placed(recipe, hardware)
    else:
        strategy, processes = placement.strategy, placement.world_size
    conversation = None if workload is None else workload.conversation
    return plan_settings(
        recipe,
        strategy=strategy,
        processes=processes,
        device=hardware.device,
        attention=attention_kind(recipe, hardware.device),
        longest=None if workload is None else workload.longest,
        supervised=None if workload is None else workload.supervised,
        conversation=conversation,
        new_tokens=None if workload is None else workload.new_tokens,
    )


def _placed(recipe: "Recipe", hardware: Hardware) -> "tuple[Strategy, int]":
    wanted = recipe.distributed.strategy
    if wanted == "single":
        return "single", 1
    processes = hardware.count
    if wanted != "auto":
        return wanted, processes
    if processes == 1:
        return "single", 1
    return ("zero3" if recipe.method == "full" else "ddp"), processes
