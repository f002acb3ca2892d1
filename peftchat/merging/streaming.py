"""Models that compute while their weights stream through memory: base + adapter as the reference, and the merged model.

The reference consists of transformers' modules and PEFT's layers. Only trained token rows are written into the weights
first, as PEFT's own merge does: PEFT's unmerged forward omits the bias of an output head (huggingface/peft#3649).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from peftchat.merging.adapter_source import AdaptedModule, InstalledAdapter
from peftchat.merging.base_weights import BaseWeights, blocks
from peftchat.merging.delta_rules import subtract_init, token_layer, trained_token_rows
from peftchat.merging.deltas import ReplaceRows
from peftchat.merging.empty_model import EmptyModel, ParameterSlot
from peftchat.merging.merge_plan import MergePlan


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a checkpoint in float32, with trained token rows and parameters in place of the stored ones."""

    weights: BaseWeights
    tokens: Mapping[str, ReplaceRows]
    saved: Mapping[str, torch.Tensor]

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Return rows `start` to `stop` of a parameter."""
        saved = self.saved.get(name)
        block = self.weights.rows(name, start, stop) if saved is None else saved[start:stop] if saved.dim() else saved
        block = block.to(torch.float32, copy=True)
        trained = self.tokens.get(name)
        if trained is not None:
            for token_id, row in zip(trained.ids, trained.values, strict=True):
                if start <= token_id < start + len(block):
                    block[token_id - start] = row
        return block


@dataclass(frozen=True)
class MergedReference:
    """Weights of the base with a plan's deltas, in float32: the reference for several or scaled adapters."""

    weights: BaseWeights
    plan: MergePlan

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Return rows `start` to `stop` of a parameter."""
        owner = name if name in self.plan.untied else self.weights.source(name)
        delta = self.plan.deltas.get(owner)
        if delta is None:
            return self.weights.rows(name, start, stop).to(torch.float32, copy=True)
        if delta.needs_all_rows:
            return delta.apply(self.weights.rows(name).to(torch.float32, copy=True), 0)[start:stop]
        return delta.apply(self.weights.rows(name, start, stop).to(torch.float32, copy=True), start)


def unmerged_model(
    adapter: InstalledAdapter, weights: BaseWeights, added_tokens: Sequence[InstalledAdapter] = ()
) -> EmptyModel:
    """Return the adapter's model, computing with PEFT's layers and the base's weights as they stream in.

    Args:
        adapter: the adapter, in a model of its own.
        weights: the base.
        added_tokens: adapters that hold the adapter's trained token rows.
    """
    model = adapter.empty_model.model
    found = ((module, trained_token_rows(module)) for other in added_tokens for module in other.modules)
    tokens = {f"{module.path}.weight": rows for module, rows in found if rows is not None}
    modules = []
    for module in adapter.modules:
        rows = trained_token_rows(module)
        if rows is None:
            modules.append(module)
        else:
            tokens[f"{module.path}.weight"] = rows
            model.set_submodule(module.path, token_layer(module).base_layer)
    stream_weights(adapter.empty_model, StoredWeights(weights, tokens, adapter.saved), modules)
    return adapter.empty_model


def trained_token_ids(adapters: list[InstalledAdapter]) -> list[int]:
    """Return the ids of the tokens whose rows were trained."""
    rows = (trained_token_rows(module) for adapter in adapters for module in adapter.modules)
    return sorted({token_id for found in rows if found is not None for token_id in found.ids})


class WeightSource(Protocol):
    """Weights by parameter name, float32."""

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Return rows `start` to `stop` of a parameter."""
        ...


_HEAD_BLOCK = 32 << 20


def stream_weights(empty_model: EmptyModel, source: WeightSource, modules: Iterable[AdaptedModule] = ()) -> None:
    """Make an empty model, with or without PEFT's layers, compute with the weights of `source`.

    Buffers are not read from the checkpoint: transformers computes those of causal models when it builds them.
    """
    inside: set[str] = set()
    for module in modules:
        inside.update(module.slots)
        _fill_while_running(module.layer, module.slots, source, partial(subtract_init, module))
    embedding = _if_instance(empty_model.model.get_input_embeddings(), nn.Embedding)
    head = _if_instance(empty_model.model.get_output_embeddings(), nn.Linear)
    by_owner: dict[int, dict[str, ParameterSlot]] = {}
    for name, slot in empty_model.slots.items():
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


def keep_positions(empty_model: EmptyModel, mask: torch.Tensor) -> None:
    """Restrict the output head to the n positions where `mask` (`[batch, length]`, bool) is true: `[1, n, size]`.

    Logits of padding would take one float per token of the vocabulary and position.
    """
    head = empty_model.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: (args[0][mask][None], *args[1:]))


def _if_instance(module: Any, kind: type[nn.Module]) -> nn.Module | None:
    """Return the module if it is of a class that uses its weight as `kind` does; None for PEFT's layers."""
    return module if isinstance(module, kind) else None


def _fill_while_running(
    module: nn.Module,
    slots: dict[str, ParameterSlot],
    source: WeightSource,
    after_fill: Callable[[], None] | None = None,
) -> None:
    def before(module: nn.Module, args: Any) -> None:
        for name, slot in slots.items():
            slot.fill(source.rows(name, 0, None))
        if after_fill is not None:
            after_fill()

    def after(module: nn.Module, args: Any, result: Any) -> None:
        for slot in slots.values():
            slot.empty()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _read_occurring_rows(embedding: nn.Module, name: str, source: WeightSource) -> None:
    # The reduced table has no row of the padding id, which matters only to gradients.
    embedding.padding_idx = None  # type: ignore[assignment]

    def before(module: nn.Module, args: Any) -> Any:
        ids, indices = torch.unique(args[0], return_inverse=True)
        table = torch.cat([source.rows(name, int(token_id), int(token_id) + 1) for token_id in ids])
        module._parameters["weight"] = nn.Parameter(table, requires_grad=False)
        return (indices, *args[1:])

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
