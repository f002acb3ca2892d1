"""Run a model whose weights do not fit in memory: a module gets its weights just before it runs, and loses them after.

The modules are transformers' and PEFT's own; only where the weights come from is ours. The input embedding is read by
the rows that occur and the output head is multiplied block by block, since they can be larger than a whole layer.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from peftchat.merging.adapter import Site
from peftchat.merging.hollow import HollowModel, Slot
from peftchat.merging.residual import take_out_start
from peftchat.merging.weights import blocks


class WeightSource(Protocol):
    """Weights by parameter name, float32."""

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter."""
        ...


_HEAD_BLOCK = 32 << 20


def stream_weights(hollow: HollowModel, source: WeightSource, sites: Iterable[Site] = ()) -> None:
    """Make the hollow model (with or without PEFT's layers in it) compute with the weights of `source`.

    Buffers of the checkpoint are not touched: transformers computes those of causal models when it builds them.
    """
    inside: set[str] = set()
    for site in sites:
        inside.update(site.slots)
        _fill_while_running(site.module, site.slots, source, partial(take_out_start, site))
    embedding = _plain(hollow.model.get_input_embeddings(), nn.Embedding)
    head = _plain(hollow.model.get_output_embeddings(), nn.Linear)
    by_owner: dict[int, dict[str, Slot]] = {}
    for name, slot in hollow.slots.items():
        if name not in inside:
            by_owner.setdefault(id(slot.owner), {})[name] = slot
    for slots in by_owner.values():
        owner = next(iter(slots.values())).owner
        if owner is embedding:
            _read_occurring_rows(embedding, next(iter(slots)), source)
        elif owner is head:
            _multiply_in_blocks(head, slots, source)
        else:
            _fill_while_running(owner, slots, source)


def keep_positions(hollow: HollowModel, wanted: torch.Tensor) -> None:
    """Let the output head see only the positions where `wanted` (`[batch, length]`, bool) is true: `[1, n, size]`.

    Padding costs a vocabulary of floats a position; everything after the head works on any number of positions.
    """
    head = hollow.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: (args[0][wanted][None], *args[1:]))


def _plain(module: Any, kind: type[nn.Module]) -> nn.Module | None:
    """The module, if it stores and uses its weight the way `kind` does (scaled embeddings do; PEFT's layers do not)."""
    return module if isinstance(module, kind) else None


def _fill_while_running(
    module: nn.Module, slots: dict[str, Slot], source: WeightSource, prepare: Callable[[], None] | None = None
) -> None:
    def before(module: nn.Module, args: Any) -> None:
        for name, slot in slots.items():
            slot.fill(source.rows(name, 0, None))
        if prepare is not None:
            prepare()

    def after(module: nn.Module, args: Any, result: Any) -> None:
        for slot in slots.values():
            slot.empty()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _read_occurring_rows(embedding: nn.Module, name: str, source: WeightSource) -> None:
    # The small table has no row of the padding id; it only matters to gradients.
    embedding.padding_idx = None  # type: ignore[assignment]

    def before(module: nn.Module, args: Any) -> Any:
        ids, places = torch.unique(args[0], return_inverse=True)
        table = torch.cat([source.rows(name, int(index), int(index) + 1) for index in ids])
        module._parameters["weight"] = nn.Parameter(table, requires_grad=False)
        return (places, *args[1:])

    embedding.register_forward_pre_hook(before)


def _multiply_in_blocks(head: nn.Module, slots: dict[str, Slot], source: WeightSource) -> None:
    weight = next(name for name, slot in slots.items() if slot.attribute == "weight")
    bias = next((name for name, slot in slots.items() if slot.attribute == "bias"), None)
    rows, width = slots[weight].shape

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden.new_empty((*hidden.shape[:-1], rows))
        for start, stop in blocks(rows, width * 4, _HEAD_BLOCK):
            part = functional.linear(hidden, source.rows(weight, start, stop))
            logits[..., start:stop] = part if bias is None else part + source.rows(bias, start, stop)
        return logits

    head.forward = forward
