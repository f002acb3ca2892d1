"""Open base and adapters and lay out the merge; nothing is written here, so every refusal leaves no trace."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftchat.merging.adapter import (
    WEIGHTS_NAME,
    Adapter,
    check_weights,
    install_adapter,
    read_config,
    vocabulary_needed,
)
from peftchat.merging.choose_base import BaseChoice, choose_base
from peftchat.merging.fold import changes_of
from peftchat.merging.fold.change import Change
from peftchat.merging.hollow import HollowModel, build_hollow
from peftchat.merging.journal import file_digest, fingerprint
from peftchat.merging.options import MergeOptions
from peftchat.merging.plan import Plan, check_working_set, make_plan
from peftchat.merging.quantized import quantized_parameters
from peftchat.merging.run import Run, base_config, find_base, open_run
from peftchat.merging.shards import Checkpoint
from peftchat.merging.weights import BaseWeights, RoundTrip
from peftchat.models.saving import TOKEN_ROWS


@dataclass(frozen=True)
class Member:
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
class Base:
    """The base model: its folder, transformers config, tensors, and the rows its embeddings must have."""

    folder: Path
    config: Any
    checkpoint: Checkpoint
    rows: int
    trust_remote_code: bool

    def hollow(self) -> HollowModel:
        """A fresh model without weights, grown to the merged vocabulary."""
        return build_hollow(self.config, rows=self.rows, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Job:
    """A merge, ready to be written.

    Attributes:
        weights: the base as the adapter is folded into it.
        fingerprint: of everything that decides the result.
    """

    run: Run
    base: Base
    members: tuple[Member, ...]
    weights: BaseWeights
    choice: BaseChoice
    plan: Plan
    fingerprint: str


def prepare(folder: Path, options: MergeOptions) -> Job:
    """Read everything but the weights and decide what will be written.

    Raises:
        InputError: whatever is wrong with run, base, adapters or options.
    """
    run = open_run(folder)
    members = [Member(folder, run.config, options.scale), *_rows_beside(folder, options.scale)]
    for other, weight in options.adapters:
        config = read_config(other)
        check_weights(other)
        members += [Member(other, config, weight), *_rows_beside(other, weight)]
    base = _open_base(run, members)
    hollow = base.hollow()
    plain = BaseWeights(base.checkpoint, hollow)
    adapters = [(member.weight, install_adapter(base.hollow(), member.config, member.folder)) for member in members]
    plan = make_plan(plain, _changes(adapters, plain), options.dtype)
    weights = plain
    if run.quantization is None:
        choice = choose_base(options.base, (plain, plan.updates), None, options.dtype)
    else:
        trained = BaseWeights(base.checkpoint, hollow, round_trip=_round_trips(run, hollow))
        trained_plan = make_plan(trained, _changes(adapters, trained), options.dtype)
        choice = choose_base(options.base, (plain, plan.updates), (trained, trained_plan.updates), options.dtype)
        if choice.taken == "dequantized":
            weights, plan = trained, trained_plan
    if options.working_set is not None:
        check_working_set(plan, weights, options.working_set)
    mark = fingerprint(
        {
            "base": [str(base.folder), base.checkpoint.fingerprint()],
            "adapters": [[file_digest(member.folder / WEIGHTS_NAME), member.weight] for member in members],
            "configs": [member.config.to_dict() for member in members],
            "taken": choice.taken,
            "dtype": options.dtype,
            "shards": {file: [tensor.spec for tensor in tensors] for file, tensors in plan.shards.items()},
        }
    )
    return Job(run, base, tuple(members), weights, choice, plan, mark)


def _rows_beside(folder: Path, weight: float) -> list[Member]:
    rows = folder / TOKEN_ROWS
    if not rows.is_dir():
        return []
    check_weights(rows)
    return [Member(rows, read_config(rows), weight, is_rows=True)]


def _open_base(run: Run, members: list[Member]) -> Base:
    folder = find_base(run.base, run.revision)
    config = base_config(folder, run.trust_remote_code)
    rows = max(vocabulary_needed(member.config, member.folder) for member in members)
    return Base(folder, config, Checkpoint.open(folder), rows, run.trust_remote_code)


def _changes(adapters: list[tuple[float, Adapter]], weights: BaseWeights) -> list[tuple[float, Mapping[str, Change]]]:
    def read(name: str) -> torch.Tensor:
        return weights.rows(name).to(torch.float32, copy=True)

    return [(weight, changes_of(adapter, read)) for weight, adapter in adapters]


def _round_trips(run: Run, hollow: HollowModel) -> dict[str, RoundTrip]:
    assert run.quantization is not None
    return {
        name: partial(run.quantization.round_trip, transposed=transposed)
        for name, transposed in quantized_parameters(hollow).items()
    }
