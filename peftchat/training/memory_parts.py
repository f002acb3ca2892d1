"""What fills this process's memory at the end of a run, part by part, for `run.json`."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftchat.training.progress import memory_in_use

if TYPE_CHECKING:
    from peftchat.training.trainer import ChatTrainer


def memory_parts(trainer: "ChatTrainer", at_start: int, peak: int) -> dict[str, int]:
    """Bytes of this process by part: what it held before the model came, what stays all the time, and the rest.

    `activations_and_rest` is the peak without the parts that are known: activations, logits, gathered weights,
    buffers of communication, and what allocators keep.

    Args:
        at_start: bytes held before the model was loaded; 0 on a GPU.
        peak: the most bytes held.
    """
    parameters = list(trainer.model.parameters())
    trained = sum(_own_bytes(parameter) for parameter in parameters if parameter.requires_grad)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    known = {
        "start": at_start,
        "frozen_weights": sum(map(_own_bytes, frozen)) + _bytes_of(trainer.model.buffers()),
        "trained_weights": trained,
        # As large as the weights, wherever they are collected.
        "gradients": trained,
        "optimizer": _bytes_of(_tensors(_states(trainer))),
    }
    return known | {"activations_and_rest": max(0, peak - sum(known.values()))}


def _own_bytes(parameter: nn.Parameter) -> int:
    """Bytes of the part of a parameter that this process keeps; under ZeRO-3 a slice."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return held.numel() * held.element_size()


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _states(trainer: "ChatTrainer") -> Iterator[Any]:
    """What the optimizer keeps: its states, and under DeepSpeed float32 masters too."""
    optimizer: Any = trainer.optimizer
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield getattr(optimizer, "state", None)
        # The names of stage 2 and stage 3.
        yield getattr(optimizer, "single_partition_of_fp32_groups", None)
        yield getattr(optimizer, "fp32_partitioned_groups_flat", None)
        optimizer = getattr(optimizer, "optimizer", None)


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple | Iterator):
        for value in held:
            yield from _tensors(value)


def seconds_since_start() -> float:
    """How long this process has been running."""
    import psutil

    return time.time() - float(psutil.Process(os.getpid()).create_time())


def held_before_model() -> int:
    """Bytes in use now, to be called before the model is loaded: 0 on a GPU."""
    return 0 if torch.cuda.is_available() else memory_in_use()
