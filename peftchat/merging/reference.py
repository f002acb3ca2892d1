"""Base + adapter, not merged: the side that a merged model is compared with.

It is stock: transformers' modules with PEFT's layers in them. Only token rows are put in their place in the weights
first, which is what PEFT's own merge does with them: its unmerged forward leaves out the bias of an output head
(huggingface/peft#3649).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from peftchat.merging.adapter import Adapter
from peftchat.merging.fold import token_rows
from peftchat.merging.fold.change import Rows
from peftchat.merging.hollow import HollowModel
from peftchat.merging.plan import Plan
from peftchat.merging.streamed import stream_weights
from peftchat.merging.weights import BaseWeights


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a checkpoint in float32, with trained rows and parameters trained whole in their place."""

    weights: BaseWeights
    tokens: Mapping[str, Rows]
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
class FoldedWeights:
    """Weights of the base with a plan's updates, in float32: what several or scaled adapters come to."""

    weights: BaseWeights
    plan: Plan

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter."""
        owner = name if name in self.plan.untied else self.weights.source(name)
        update = self.plan.updates.get(owner)
        if update is None:
            return self.weights.rows(name, start, stop).to(torch.float32, copy=True)
        if update.whole:
            return update.rows(self.weights.rows(name).to(torch.float32, copy=True), 0)[start:stop]
        return update.rows(self.weights.rows(name, start, stop).to(torch.float32, copy=True), start)


def unmerged_model(adapter: Adapter, weights: BaseWeights, beside: Sequence[Adapter] = ()) -> HollowModel:
    """The adapter's model, computing with the base's weights as they stream in and PEFT's layers beside them.

    Args:
        adapter: the adapter, in a model of its own.
        weights: the base.
        beside: adapters of token rows that belong to it.
    """
    model = adapter.hollow.model
    found = ((site, token_rows.rows_of(site)) for other in beside for site in other.sites)
    tokens = {f"{site.path}.weight": rows for site, rows in found if rows is not None}
    others = []
    for site in adapter.sites:
        rows = token_rows.rows_of(site)
        if rows is None:
            others.append(site)
        else:
            tokens[f"{site.path}.weight"] = rows
            model.set_submodule(site.path, token_rows.layer_of(site).base_layer)
    stream_weights(adapter.hollow, StoredWeights(weights, tokens, adapter.saved), others)
    return adapter.hollow


def trained_token_ids(adapters: list[Adapter]) -> list[int]:
    """The ids whose rows were trained."""
    rows = (token_rows.rows_of(site) for adapter in adapters for site in adapter.sites)
    return sorted({index for found in rows if found is not None for index in found.ids})
