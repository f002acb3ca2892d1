"""Rows and order of each epoch of a mixture, for the trainer's data loader."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from peftchat.dataset.epochs import EpochPacks


class EpochDataset(Dataset[dict[str, list[int]]]):
    """The packs of all epochs of a mixture; `len` is the number of one epoch, as the trainer counts it.

    A row's index says the epoch too (`EpochSampler`). So the workers of a data loader, which are copies of this object,
    need not be told which epoch it is.

    Attributes:
        epochs: the packs of each epoch.
    """

    def __init__(self, epochs: EpochPacks) -> None:
        self.epochs = epochs

    def __len__(self) -> int:
        return len(self.epochs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        epoch, place = divmod(index, len(self.epochs))
        return {"examples": self.epochs.of_epoch(epoch)[place]}


class EpochSampler(Sampler[int]):
    """Shuffles the packs of an epoch, by the seed and the epoch alone, the same in every process.

    Args:
        epochs: the packs of each epoch.
        seed: of the order.
        batch_size: examples of similar length share a batch of this many; None to shuffle only.
        tell: called with a sentence about an epoch that leaves examples out.
    """

    def __init__(self, epochs: EpochPacks, seed: int, batch_size: int | None, tell: Callable[[str], None]) -> None:
        self._epochs, self._seed, self._batch_size, self._tell = epochs, seed, batch_size, tell
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._epochs)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed + self._epoch)
        count = len(self._epochs)
        lengths = self._epochs.lengths_of(self._epoch).tolist()
        if self._epochs.left_out:
            self._tell(
                f"epoch {self._epoch + 1} leaves out {self._epochs.left_out} of its drawn examples: "
                f"they fill more than the {count} packs of an epoch"
            )
        if self._batch_size is None:
            order = torch.randperm(count, generator=generator).tolist()
        else:
            order = get_length_grouped_indices(lengths, self._batch_size, generator=generator)
        return (self._epoch * count + place for place in order)


class EpochCallback(TrainerCallback):
    """Tells a sampler the epoch.

    accelerate does too, but its call does not reach the sampler of a run of several processes that is resumed within an
    epoch: `DataLoaderShard.set_epoch` looks two batch samplers deep, and the sampler is below the third.

    Args:
        sampler: the sampler.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **objects: Any) -> None:
        """Set the epoch, counted from the steps as the trainer does."""
        steps = math.ceil(len(objects["train_dataloader"]) / args.gradient_accumulation_steps)
        self._sampler.set_epoch(state.global_step // steps)
