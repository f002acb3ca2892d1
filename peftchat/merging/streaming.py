"""Base + adapter, not merged: the side that a merged model is compared with.

It is stock: transformers' modules with PEFT's layers in them. Only token rows are put in their place in the weights
first, which is what PEFT's own merge does with them: its unmerged forward leaves out the bias of an output head
(huggingface/peft#3649).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from peftchat.merging.adapter_source import AdaptedModule, AdapterWeights
from peftchat.merging.base_weights import BaseWeights, blocks
from peftchat.merging.delta_rules import layer_of, subtract_init, token_ids_of
from peftchat.merging.deltas import ReplaceRows
from peftchat.merging.empty_model import EmptyModel, ParameterSlot
from peftchat.merging.merge_plan import MergePlan


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a checkpoint in float32, with trained rows and parameters trained whole in their place."""

    weights: BaseWeights
    tokens: Mapping[str, ReplaceRows]
    saved: Mapping[str, torch.Tensor]

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter."""
        if name in self.saved:
            return self.saved[name][start:stop].to(torch.float32)
        block = self.weights.rows(name, start, stop).to(torch.float32, copy=True)
        trained = self.tokens.get(name)
        if trained is not None:
            for index, value in zip(trained.ids, trained.values, strict=True):
                if start <= index < start + len(block):
                    block[index - start] = value
        return block


@dataclass(frozen=True)
class MergedReference:
    """Weights of the base with a plan's updates, in float32: what several or scaled adapters come to."""

    weights: BaseWeights
    plan: MergePlan

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter."""
        owner = name if name in self.plan.untied else self.weights.source(name)
        update = self.plan.updates.get(owner)
        if update is None:
            return self.weights.rows(name, start, stop).to(torch.float32, copy=True)
        if update.whole:
            return update.rows(self.weights.rows(name).to(torch.float32, copy=True), 0)[start:stop]
        return update.rows(self.weights.rows(name, start, stop).to(torch.float32, copy=True), start)


def unmerged_model(adapter: AdapterWeights, weights: BaseWeights, beside: Sequence[AdapterWeights] = ()) -> EmptyModel:
    """The adapter's model, computing with the base's weights as they stream in and PEFT's layers beside them.

    Args:
        adapter: the adapter, in a model of its own.
        weights: the base.
        beside: adapters of token rows that belong to it.
    """
    model = adapter.hollow.model
    found = ((site, token_ids_of(site)) for other in beside for site in other.sites)
    tokens = {f"{site.path}.weight": rows for site, rows in found if rows is not None}
    others = []
    for site in adapter.sites:
        rows = token_ids_of(site)
        if rows is None:
            others.append(site)
        else:
            tokens[f"{site.path}.weight"] = rows
            model.set_submodule(site.path, layer_of(site).base_layer)
    stream_weights(adapter.hollow, StoredWeights(weights, tokens, adapter.saved), others)
    return adapter.hollow


def trained_token_ids(adapters: list[AdapterWeights]) -> list[int]:
    """The ids whose rows were trained."""
    rows = (token_ids_of(site) for adapter in adapters for site in adapter.sites)
    return sorted({index for found in rows if found is not None for index in found.ids})


class WeightSource(Protocol):
    """Weights by parameter name, float32."""

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter."""
        ...


_HEAD_BLOCK = 32 << 20


def stream_weights(hollow: EmptyModel, source: WeightSource, sites: Iterable[AdaptedModule] = ()) -> None:
    """Make the hollow model (with or without PEFT's layers in it) compute with the weights of `source`.

    Buffers of the checkpoint are not touched: transformers computes those of causal models when it builds them.
    """
    inside: set[str] = set()
    for site in sites:
        inside.update(site.slots)
        _fill_while_running(site.module, site.slots, source, partial(subtract_init, site))
    embedding = _plain(hollow.model.get_input_embeddings(), nn.Embedding)
    head = _plain(hollow.model.get_output_embeddings(), nn.Linear)
    by_owner: dict[int, dict[str, ParameterSlot]] = {}
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


def keep_positions(hollow: EmptyModel, wanted: torch.Tensor) -> None:
    """Let the output head see only the positions where `wanted` (`[batch, length]`, bool) is true: `[1, n, size]`.

    Padding costs a vocabulary of floats a position; everything after the head works on any number of positions.
    """
    head = hollow.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: (args[0][wanted][None], *args[1:]))


def _plain(module: Any, kind: type[nn.Module]) -> nn.Module | None:
    """The module, if it stores and uses its weight the way `kind` does (scaled embeddings do; PEFT's layers do not)."""
    return module if isinstance(module, kind) else None


def _fill_while_running(
    module: nn.Module, slots: dict[str, ParameterSlot], source: WeightSource, prepare: Callable[[], None] | None = None
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


def _multiply_in_blocks(head: nn.Module, slots: dict[str, ParameterSlot], source: WeightSource) -> None:
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
