"""A merge as a job: the user's options, base, adapters and the plan of the merged checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftchat.merging.adapter_file import ADAPTER_WEIGHTS_NAME, check_weights, vocabulary_needed
from peftchat.merging.adapter_source import (
    AdapterSource,
    InstalledAdapter,
    install_adapter,
    read_adapter_config,
    unquantized_config,
)
from peftchat.merging.base_weights import BaseWeights, RoundTrip
from peftchat.merging.combination import Combination
from peftchat.merging.delta_rules import collect_deltas
from peftchat.merging.deltas import Delta
from peftchat.merging.empty_model import EmptyModel, build_empty_model
from peftchat.merging.merge_plan import (
    MergePlan,
    Rounding,
    check_memory_budget,
    file_digest,
    job_fingerprint,
    plan_merge,
)
from peftchat.merging.qlora_base import BaseMode, Quantization, SelectedBase, quantized_parameters, select_base
from peftchat.models.base_check import check_ties
from peftchat.models.base_content import check_run
from peftchat.models.safetensors_files import SafetensorsCheckpoint
from peftchat.models.saving import TOKEN_ROWS
from peftchat.models.source import ModelSource

DEFAULT_BLOCK = 64 << 20
"""Bytes of memory for one block of rows without a memory budget; larger blocks are not faster."""


@dataclass(frozen=True)
class MergeOptions:
    """The user's options.

    Attributes:
        output: the merged model's folder; None for `RUN/merged`.
        base: the weights that the adapter of a QLoRA run is merged into.
        base_model: folder or hub id of the base; None for the one that the run was trained on.
        allow_changed: merge although base, tokenizer or template changed since the run.
        verify: compare the logits of the merged model with base + adapter.
        scale: weight of the run's own adapter; 1 is as trained.
        adapters: further adapters on the same base, with their weights.
        memory_budget: bytes of memory for the weights being merged; None for one tensor and its delta.
        dtype: dtype of the merged weights; None keeps each as the base stores it.
        overwrite: replace an existing folder.
        combination: how the adapters' deltas become one; None for their weighted sum.
        rounding: of weights that change, where they are stored in bfloat16.
    """

    output: Path | None = None
    base: BaseMode = "auto"
    verify: bool = True
    scale: float = 1.0
    adapters: tuple[tuple[Path, float], ...] = ()
    memory_budget: int | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False
    base_model: str | None = None
    allow_changed: bool = False
    combination: Combination | None = None
    rounding: Rounding = "stochastic"

    @property
    def block_bytes(self) -> int:
        """Bytes of memory for one block of rows."""
        return min(self.memory_budget or DEFAULT_BLOCK, DEFAULT_BLOCK)


@dataclass(frozen=True)
class MergeAdapter:
    """One adapter of the merge.

    Attributes:
        folder: the adapter's files.
        config: its PEFT config.
        weight: factor of its delta; 1 is as trained.
        is_added_tokens: it holds the added tokens of the adapter before it, whose PEFT type cannot hold them.
    """

    folder: Path
    config: Any
    weight: float
    is_added_tokens: bool = False


@dataclass(frozen=True)
class MergeBase:
    """The base model on disk.

    Attributes:
        folder: its files.
        config: its transformers config.
        checkpoint: its tensors.
        vocabulary_size: smallest number of embedding rows that the adapters need.
        trust_remote_code: as in transformers.
    """

    folder: Path
    config: Any
    checkpoint: SafetensorsCheckpoint
    vocabulary_size: int
    trust_remote_code: bool

    def empty_model(self) -> EmptyModel:
        """Build a new model without weights, with the merged vocabulary."""
        return build_empty_model(
            self.config, vocabulary_size=self.vocabulary_size, trust_remote_code=self.trust_remote_code
        )

    def install(self, adapter: MergeAdapter) -> InstalledAdapter:
        """Build a new model without weights and install an adapter in it."""
        return install_adapter(self.empty_model(), adapter.config, adapter.folder)


@dataclass(frozen=True)
class MergeJob:
    """A merge, ready to be written.

    Attributes:
        weights: the base weights that the adapters are merged into.
        fingerprint: hash of everything that determines the result.
        allowed_changes: what changed since the run was trained, and was allowed.
        combination: how the deltas become one; None for their weighted sum.
        rounding: of weights that change, where they are stored in bfloat16.
    """

    source: AdapterSource
    base: MergeBase
    adapters: tuple[MergeAdapter, ...]
    weights: BaseWeights
    selected_base: SelectedBase
    plan: MergePlan
    fingerprint: str
    allowed_changes: tuple[str, ...] = ()
    combination: Combination | None = None
    rounding: Rounding = "stochastic"

    @property
    def is_as_trained(self) -> bool:
        """Whether it merges a single adapter, neither scaled nor combined."""
        return len(self.groups()) == 1 and self.adapters[0].weight == 1.0 and self.combination is None

    def groups(self) -> list[tuple[MergeAdapter, list[MergeAdapter]]]:
        """Return each adapter with those that hold its added tokens."""
        found: list[tuple[MergeAdapter, list[MergeAdapter]]] = []
        for adapter in self.adapters:
            if adapter.is_added_tokens:
                found[-1][1].append(adapter)
            else:
                found.append((adapter, []))
        return found


def prepare_merge(folder: Path, options: MergeOptions) -> MergeJob:
    """Read everything but the weights and plan the merged checkpoint.

    Raises:
        UserError: the run, the base, an adapter or an option cannot be used.
    """
    source = AdapterSource.open(folder, options.base_model)
    adapters = [MergeAdapter(folder, source.config, options.scale), *_added_tokens_of(folder, options.scale)]
    for other, weight in options.adapters:
        config = read_adapter_config(other)
        check_weights(other)
        adapters += [MergeAdapter(other, config, weight), *_added_tokens_of(other, weight)]
    base = _open_base(source.base, adapters)
    changes = check_run(source.model, source.base, allow_changed=options.allow_changed, exact=True)
    empty_model = base.empty_model()
    check_ties(base.checkpoint, empty_model.model, source.base)
    weights = BaseWeights(base.checkpoint, empty_model)
    installed = [(adapter.weight, base.install(adapter)) for adapter in adapters]
    plan = plan_merge(weights, _deltas(installed, weights), options.dtype, options.combination)
    if source.quantization is None:
        selected = select_base(options.base, (weights, plan.deltas), None, options.dtype)
    else:
        trained = BaseWeights(base.checkpoint, empty_model, round_trip=_round_trips(source.quantization, empty_model))
        trained_deltas = _deltas(installed, trained)
        trained_plan = plan_merge(trained, trained_deltas, options.dtype, options.combination)
        selected = select_base(options.base, (weights, plan.deltas), (trained, trained_plan.deltas), options.dtype)
        if selected.kind == "dequantized":
            weights, plan = trained, trained_plan
    if options.memory_budget is not None:
        check_memory_budget(plan, weights, options.memory_budget)
    fingerprint = job_fingerprint(
        {
            "base": [str(base.folder), base.checkpoint.fingerprint()],
            "base_kind": selected.kind,
            "adapters": [[file_digest(adapter.folder / ADAPTER_WEIGHTS_NAME), adapter.weight] for adapter in adapters],
            "configs": [adapter.config.to_dict() for adapter in adapters],
            "combination": options.combination,
            "dtype": options.dtype,
            "rounding": options.rounding,
            "shards": {file: [tensor.spec for tensor in tensors] for file, tensors in plan.shards.items()},
        }
    )
    return MergeJob(
        source, base, tuple(adapters), weights, selected, plan, fingerprint, changes, options.combination,
        options.rounding,
    )  # fmt: skip


def _added_tokens_of(folder: Path, weight: float) -> list[MergeAdapter]:
    added_tokens = folder / TOKEN_ROWS
    if not added_tokens.is_dir():
        return []
    check_weights(added_tokens)
    return [MergeAdapter(added_tokens, read_adapter_config(added_tokens), weight, is_added_tokens=True)]


def _open_base(base: ModelSource, adapters: list[MergeAdapter]) -> MergeBase:
    config = unquantized_config(base)
    base.check_weights()
    folder = base.download()
    vocabulary_size = max(vocabulary_needed(adapter.config, adapter.folder) for adapter in adapters)
    checkpoint = SafetensorsCheckpoint.open(folder)
    return MergeBase(folder, config, checkpoint, vocabulary_size, bool(base.trust_remote_code))


def _deltas(
    adapters: list[tuple[float, InstalledAdapter]], weights: BaseWeights
) -> list[tuple[float, Mapping[str, tuple[Delta, ...]]]]:
    def read(name: str) -> torch.Tensor:
        return weights.rows(name).to(torch.float32, copy=True)

    return [(weight, collect_deltas(adapter, read)) for weight, adapter in adapters]


def _round_trips(quantization: Quantization, empty_model: EmptyModel) -> dict[str, RoundTrip]:
    return {
        name: partial(quantization.round_trip, transposed=transposed)
        for name, transposed in quantized_parameters(empty_model).items()
    }
