"""Settings of a plan: the recipe on a device, and the size of its dataset."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peftchat.chat_template.templates import added_token_count
from peftchat.errors import UserError
from peftchat.planning.hardware import Device, Hardware
from peftchat.planning.pairs import PairLayout, longest_row, pair_lengths, rows_of_pair
from peftchat.training import packs
from peftchat.training.distributed import is_sharded, weight_dtype

if TYPE_CHECKING:
    import numpy as np

    from peftchat.chat_template.chat_format import ChatFormat
    from peftchat.dataset.cache import EncodedSplit
    from peftchat.recipe import Recipe
    from peftchat.recipe.sections import Dtype, MasterWeights, Method, Offload, Optimizer
    from peftchat.training.distributed import DistributedSetup, Strategy


AttentionKind = Literal["fused", "masked", "eager"]
"""What attention saves for the backward pass.

- `fused`: inputs, output and one number per query (Dao et al., 2022).
- `masked`: also a mask over every pair of positions, by SDPA.
- `eager`: the scores of every pair.
"""


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """Everything that the memory of a step depends on, except batch and length.

    Attributes:
        weight_dtype: dtype of the unquantized weights, by torch's name.
        autocast: dtype of autocast; None without it.
        trainable_dtype: dtype that DeepSpeed casts trainable weights to; None for PEFT's own.
        attention: the kind of attention.
        quantized: whether frozen weights are quantized.
        checkpointing: whether each block is recomputed in the backward pass.
        fused_lora: whether plain LoRA layers run fused (`peftchat.models.fused_lora`).
        new_tokens: embeddings of added tokens trained beside a frozen embedding.
    """

    weight_dtype: str
    autocast: str | None
    trainable_dtype: str | None
    attention: AttentionKind
    quantized: bool
    checkpointing: bool
    fused_lora: bool
    new_tokens: int


_MAX_BYTES_READ = 64_000_000
"""Bytes of data files that are encoded for a plan; larger datasets are not read."""


@dataclass(frozen=True, slots=True)
class DatasetSize:
    """The size of a recipe's training data.

    Attributes:
        conversations: encoded conversations per epoch; of pairs, the pairs.
        sequences: examples, packs or pairs per epoch.
        tokens: tokens per epoch, without padding; of pairs, those that a trained pass computes.
        longest: tokens of the longest example, pack, or row of a pair.
        conversation: mean length of a conversation in tokens, weighted by length.
        supervised: fraction of tokens with a target.
        new_tokens: tokens that the template adds to this tokenizer.
        notes: what reading left out, changed or noticed, of all splits.
    """

    conversations: int
    sequences: int
    tokens: int
    longest: int
    conversation: int
    supervised: float
    new_tokens: int
    notes: tuple[str, ...] = ()


def read_dataset_size(recipe: "Recipe", layout: PairLayout = "rows") -> DatasetSize | str:
    """Return the size of the dataset, or the reason why it was not read.

    It is read only if tokenizer and data are local.

    Args:
        recipe: the recipe.
        layout: how pairs are laid out.
    """
    if not Path(recipe.model.name).is_dir():
        return "the tokenizer is not local"
    from peftchat.conversations.readers import find_files

    try:
        files = [find_files(entry.path, entry.split) for entry in recipe.data.train]
        if any(found is None for found in files):
            return "the data is on the Hub"
        if sum(file.stat().st_size for found in files for file in found or ()) > _MAX_BYTES_READ:
            return f"the data is larger than {_MAX_BYTES_READ // 1_000_000} MB"
        return _read(recipe, layout)
    except UserError as error:
        return str(error)


def _read(recipe: "Recipe", layout: PairLayout) -> DatasetSize:
    from peftchat.dataset.cache import load_splits
    from peftchat.dataset.mixture import data_notes
    from peftchat.training.context import load_chat_format

    chat = load_chat_format(recipe)
    splits = load_splits(recipe, chat)
    notes = tuple(
        f"{name} data: {note}" for name, split in splits.items() for note in data_notes(recipe, name, split.stats)
    )
    return replace(dataset_size(recipe, chat, splits["train"], layout), notes=notes)


def dataset_size(
    recipe: "Recipe", chat: "ChatFormat", split: "EncodedSplit", layout: PairLayout = "rows"
) -> DatasetSize:
    """Return the size of an encoded split under the recipe's packing.

    Args:
        recipe: its packing and maximum length count.
        chat: the tokenizer in the recipe's chat format.
        split: the training split, at least one example.
        layout: how pairs are laid out.
    """
    import numpy as np

    lengths, sequences = _of_an_epoch(recipe, split)
    longest, units, supervised = int(sequences.max()), len(lengths), split.stats.supervised / split.stats.tokens
    if recipe.has_pairs:
        sequences, longest = pair_lengths(recipe, split.store, layout)
        units = len(sequences)
        supervised = split.stats.supervised / int(sequences.sum())
    return DatasetSize(
        conversations=units,
        sequences=len(sequences),
        tokens=int(sequences.sum()),
        longest=longest,
        conversation=math.ceil(float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())),
        supervised=supervised,
        new_tokens=len(chat.new_tokens),
    )


def _of_an_epoch(recipe: "Recipe", split: "EncodedSplit") -> "tuple[np.ndarray, np.ndarray]":
    """Return the tokens of each example and of each pack, or example, of an epoch; of a mixture, of the first one."""
    import numpy as np

    from peftchat.dataset.epochs import EpochPacks
    from peftchat.dataset.packing import pack

    lengths = np.asarray(split.store.lengths)
    epochs = EpochPacks.of(recipe, split)
    if epochs is not None:
        return lengths[epochs.of_epoch(0).examples], epochs.lengths_of(0)
    if not recipe.data.packing:
        return lengths, lengths
    packs = pack(lengths, recipe.data.max_length, recipe.training.seed)
    return lengths, np.array([lengths[group].sum() for group in packs])


def total_steps(recipe: "Recipe", dataset: DatasetSize | None, settings: "PlanSettings") -> int | None:
    """Return the optimizer steps of the run.

    They are None if they depend on data that was not read.
    """
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    if dataset is None:
        return None
    return math.ceil(steps_per_epoch(dataset, settings) * training.num_train_epochs)


def steps_per_epoch(dataset: DatasetSize, settings: "PlanSettings") -> int:
    """Return the optimizer steps per epoch, as the trainer counts them."""
    return packs.steps_per_epoch(dataset.sequences, settings.batch * settings.processes, settings.accumulation)


BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per element of each dtype."""

DEFAULT_SUPERVISED = 0.65
"""Fraction of tokens with a target if the data was not read; chat datasets have between 0.4 and 0.8."""

DEFAULT_CONVERSATION = 256
"""Tokens per conversation if the data was not read."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """One way to train a model.

    Attributes:
        method: full, lora or qlora.
        dtype: dtype of the unquantized base model.
        compute_dtype: dtype of the computation.
        bits: 4 or 8 for a quantized base model, else None.
        double: whether the scales of 4-bit weights are quantized too.
        optimizer: its name in transformers.
        strategy: how several processes share the work.
        processes: their number, on all machines.
        offload: what DeepSpeed keeps in RAM.
        checkpointing: whether activations are recomputed in the backward pass.
        batch: examples, packs or pairs per forward pass of one process.
        length: tokens per example or pack, or in a row of a pair.
        accumulation: forward passes per optimizer step.
        supervised: fraction of tokens with a target.
        attention: the kind of attention.
        conversation: tokens per conversation.
        device: `cuda` or `cpu`.
        new_tokens: embeddings of added tokens trained beside a frozen embedding.
        master_weights: dtype in which full fine-tuning keeps the weights.
        in_backward: whether gradients are used and freed in the backward pass.
        rows: rows that each example, pack or pair takes.
        unit: what the batch counts, in the plural.
        keeps_start: whether a copy of the adapter of an earlier run is kept, for the reference.
    """

    method: "Method"
    dtype: "Dtype"
    compute_dtype: "Dtype"
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
    master_weights: "MasterWeights" = "float32"
    in_backward: bool = False
    rows: int = 1
    unit: str = "sequences"
    keeps_start: bool = False

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed shards anything."""
        return is_sharded(self.strategy)

    @property
    def weight_dtype(self) -> "Dtype":
        """The dtype of unquantized weights."""
        return weight_dtype(self.method, self.dtype, self.strategy, self.master_weights)

    @property
    def widened(self) -> bool:
        """Whether weights in bfloat16 are copied to float32, block by block, to compute with them."""
        return self.method == "full" and self.weight_dtype != "float32" and self.compute_dtype == "float32"

    @property
    def weightwise(self) -> bool:
        """Whether weights are updated one by one (`peftchat.training.weightwise`)."""
        return self.method == "full" and (self.master_weights != "float32" or self.in_backward)

    @property
    def targets(self) -> int:
        """Supervised positions of one forward pass."""
        return max(1, round(self.tokens * self.supervised))

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.batch * self.rows * self.length

    @property
    def pass_text(self) -> str:
        """The largest forward pass, in words."""
        if self.unit == "sequences":
            return f"{self.batch} x {self.length} tokens"
        return f"{self.batch} {self.unit} of {self.rows * self.length} tokens"

    @property
    def trace_config(self) -> TraceConfig:
        """The part of the settings that the trace of a step depends on."""
        return TraceConfig(
            weight_dtype="float32" if self.widened else self.weight_dtype,
            # DeepSpeed casts the model instead.
            autocast=None if self.sharded or self.compute_dtype == "float32" else self.compute_dtype,
            trainable_dtype=self.dtype if self.sharded and self.method != "full" else None,
            attention=self.attention,
            quantized=self.bits is not None,
            checkpointing=self.checkpointing,
            fused_lora=self.method != "full" and self.strategy != "zero3",
            new_tokens=0 if self.method == "full" else self.new_tokens,
        )

    def with_changes(self, **changes: object) -> "PlanSettings":
        """Return the settings with these changes."""
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
    layout: PairLayout = "rows",
) -> PlanSettings:
    """Return the recipe's settings on a device.

    Args:
        recipe: the recipe.
        strategy: how the processes share the work.
        processes: their number.
        device: `cuda` or `cpu`.
        attention: see `attention_kind`.
        longest: tokens of the longest example or pack; `data.max_length` if None.
        supervised: fraction of tokens with a target, if the data was read.
        conversation: tokens per conversation, if the data was read.
        new_tokens: tokens that the template adds, if the tokenizer was read.
        layout: how pairs are laid out.
    """
    training, quantization = recipe.training, recipe.quantization
    most = longest_row(recipe, layout) if recipe.has_pairs else recipe.data.max_length
    length = min(longest or most, most)
    multiple = recipe.data.pad_to_multiple_of or 1
    return PlanSettings(
        method=recipe.method,
        dtype=recipe.model.loaded_as,
        compute_dtype=recipe.model.computed_in,
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
        supervised=DEFAULT_SUPERVISED if supervised is None else supervised,
        attention=attention,
        conversation=conversation or DEFAULT_CONVERSATION,
        device=device,
        new_tokens=added_token_count(recipe.chat.template) if new_tokens is None else new_tokens,
        master_weights=training.master_weights,
        in_backward=training.optimizer_in_backward,
        rows=rows_of_pair(recipe, layout) if recipe.has_pairs else 1,
        unit="sequences" if not recipe.has_pairs else "labeled answers" if recipe.has_labels else "pairs",
        keeps_start=recipe.model.adapter is not None and recipe.has_reference,
    )


def attention_kind(recipe: "Recipe", device: Device) -> AttentionKind:
    """Return the kind of attention that training selects on a device.

    `peftchat.training.model` selects it.
    """
    wanted = recipe.model.attention
    if wanted == "eager":
        return "eager"
    if wanted.startswith("flash") or wanted == "flex_attention":
        return "fused"
    if wanted == "sdpa":
        return "masked"
    if device == "cuda":
        return "fused" if recipe.model.computed_in != "float32" else "masked"
    return "fused"


def settings_for(
    recipe: "Recipe",
    hardware: Hardware,
    dataset: DatasetSize | None,
    distributed: "DistributedSetup | None" = None,
    layout: PairLayout | None = None,
) -> PlanSettings:
    """Return the recipe's settings on a device.

    Args:
        recipe: the recipe.
        hardware: the device, of this machine or another.
        dataset: the size of the data, if it was read.
        distributed: the distributed setup of a run; None for the one that training would select for the hardware.
        layout: how pairs are laid out, if the data was read so.
    """
    attention = attention_kind(recipe, hardware.device)
    if layout is None:
        layout = "lines" if attention == "fused" else "rows"
    if distributed is None:
        strategy, processes = _default_strategy(recipe, hardware)
    else:
        strategy, processes = distributed.strategy, distributed.world_size
    return plan_settings(
        recipe,
        strategy=strategy,
        processes=processes,
        device=hardware.device,
        attention=attention,
        layout=layout,
        longest=None if dataset is None else dataset.longest,
        supervised=None if dataset is None else dataset.supervised,
        conversation=None if dataset is None else dataset.conversation,
        new_tokens=None if dataset is None else dataset.new_tokens,
    )


def _default_strategy(recipe: "Recipe", hardware: Hardware) -> "tuple[Strategy, int]":
    wanted = recipe.distributed.strategy
    if wanted == "single":
        return "single", 1
    processes = hardware.count
    if wanted != "auto":
        return wanted, processes
    if processes == 1:
        return "single", 1
    return ("zero3" if recipe.method == "full" else "ddp"), processes
