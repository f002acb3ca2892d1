"""What the user may choose about a merge."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftchat.merging.adapter_source import (
    ADAPTER_WEIGHTS_NAME,
    AdapterSource,
    AdapterWeights,
    check_weights,
    install_adapter,
    read_adapter_config,
    unquantized_config,
    vocabulary_needed,
)
from peftchat.merging.base_weights import BaseWeights, RoundTrip
from peftchat.merging.delta_rules import collect_deltas
from peftchat.merging.deltas import Delta
from peftchat.merging.empty_model import EmptyModel, build_empty_model
from peftchat.merging.merge_plan import MergePlan, check_memory_budget, file_digest, job_fingerprint, plan_merge
from peftchat.merging.qlora_base import BaseMode, SelectedBase, quantized_parameters, select_base
from peftchat.merging.safetensors_io import SafetensorsCheckpoint
from peftchat.models.saving import TOKEN_ROWS

DEFAULT_BLOCK = 64 << 20
"""Bytes of memory for one block of rows where the user sets no working set; larger blocks are not faster."""


@dataclass(frozen=True)
class MergeOptions:
    """The choices.

    Attributes:
        out: the merged model's folder; None for `RUN/merged`.
        base: which weights the adapter is folded into, for a run on a quantized base.
        verify: compare the logits of both sides afterwards.
        scale: weight of the run's own adapter; 1 is as trained.
        adapters: further adapters on the same base, with their weights.
        working_set: bytes of memory for weights in flight; None for one tensor and its update.
        dtype: type of the merged weights; None keeps each as the base stores it.
        overwrite: replace a folder that is already there.
    """

    out: Path | None = None
    base: BaseMode = "auto"
    verify: bool = True
    scale: float = 1.0
    adapters: tuple[tuple[Path, float], ...] = ()
    working_set: int | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False

    @property
    def block(self) -> int:
        """Bytes of memory for one block of rows."""
        return min(self.working_set or DEFAULT_BLOCK, DEFAULT_BLOCK)


@dataclass(frozen=True)
class MergeAdapter:
    """One adapter of the merge.

    Attributes:
        folder: where it lies.
        config: its PEFT config.
        weight: how much of it is wanted.
        is_rows: it holds the rows of new tokens beside the adapter before it, which has no place for them.
    """

    folder: Path
    config: Any
    weight: float
    is_rows: bool = False


@dataclass(frozen=True)
class MergeBase:
    """The base model: its folder, transformers config, tensors, and the rows its embeddings must have."""

    folder: Path
    config: Any
    checkpoint: SafetensorsCheckpoint
    rows: int
    trust_remote_code: bool

    def hollow(self) -> EmptyModel:
        """A fresh model without weights, grown to the merged vocabulary."""
        return build_empty_model(self.config, rows=self.rows, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class MergeJob:
    """A merge, ready to be written.

    Attributes:
        weights: the base as the adapter is folded into it.
        fingerprint: of everything that decides the result.
    """

    run: AdapterSource
    base: MergeBase
    members: tuple[MergeAdapter, ...]
    weights: BaseWeights
    choice: SelectedBase
    plan: MergePlan
    fingerprint: str


def prepare(folder: Path, options: MergeOptions) -> MergeJob:
    """Read everything but the weights and decide what will be written.

    Raises:
        UserError: whatever is wrong with run, base, adapters or options.
    """
    run = AdapterSource.open(folder)
    members = [MergeAdapter(folder, run.config, options.scale), *_added_tokens_beside(folder, options.scale)]
    for other, weight in options.adapters:
        config = read_adapter_config(other)
        check_weights(other)
        members += [MergeAdapter(other, config, weight), *_added_tokens_beside(other, weight)]
    base = _open_base(run, members)
    hollow = base.hollow()
    plain = BaseWeights(base.checkpoint, hollow)
    adapters = [(member.weight, install_adapter(base.hollow(), member.config, member.folder)) for member in members]
    plan = plan_merge(plain, _deltas(adapters, plain), options.dtype)
    weights = plain
    if run.quantization is None:
        choice = select_base(options.base, (plain, plan.updates), None, options.dtype)
    else:
        trained = BaseWeights(base.checkpoint, hollow, round_trip=_round_trips(run, hollow))
        trained_plan = plan_merge(trained, _deltas(adapters, trained), options.dtype)
        choice = select_base(options.base, (plain, plan.updates), (trained, trained_plan.updates), options.dtype)
        if choice.taken == "dequantized":
            weights, plan = trained, trained_plan
    if options.working_set is not None:
        check_memory_budget(plan, weights, options.working_set)
    mark = job_fingerprint(
        {
            "base": [str(base.folder), base.checkpoint.fingerprint()],
            "adapters": [[file_digest(member.folder / ADAPTER_WEIGHTS_NAME), member.weight] for member in members],
            "configs": [member.config.to_dict() for member in members],
            "taken": choice.taken,
            "dtype": options.dtype,
            "shards": {file: [tensor.spec for tensor in tensors] for file, tensors in plan.shards.items()},
        }
    )
    return MergeJob(run, base, tuple(members), weights, choice, plan, mark)


def _added_tokens_beside(folder: Path, weight: float) -> list[MergeAdapter]:
    rows = folder / TOKEN_ROWS
    if not rows.is_dir():
        return []
    check_weights(rows)
    return [MergeAdapter(rows, read_adapter_config(rows), weight, is_rows=True)]


def _open_base(run: AdapterSource, members: list[MergeAdapter]) -> MergeBase:
    config = unquantized_config(run.base)
    run.base.check_weights()
    folder = run.base.download()
    rows = max(vocabulary_needed(member.config, member.folder) for member in members)
    return MergeBase(folder, config, SafetensorsCheckpoint.open(folder), rows, bool(run.base.trust_remote_code))


def _deltas(
    adapters: list[tuple[float, AdapterWeights]], weights: BaseWeights
) -> list[tuple[float, Mapping[str, Delta]]]:
    def read(name: str) -> torch.Tensor:
        return weights.rows(name).to(torch.float32, copy=True)

    return [(weight, collect_deltas(adapter, read)) for weight, adapter in adapters]


def _round_trips(run: AdapterSource, hollow: EmptyModel) -> dict[str, RoundTrip]:
    assert run.quantization is not None
    return {
        name: partial(run.quantization.round_trip, transposed=transposed)
        for name, transposed in quantized_parameters(hollow).items()
    }
