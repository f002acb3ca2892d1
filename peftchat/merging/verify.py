"""Compare the merged model, reopened from its files, with base + adapter on the same prompts.

Both sides compute in float32, whatever type they are stored in, so that the figures show what merging did and not how
two ways of computing round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from peftchat.merging.adapter import install_adapter
from peftchat.merging.companions import read_config
from peftchat.merging.compare import Differences, compare
from peftchat.merging.hollow import HollowModel, build_hollow
from peftchat.merging.options import MergeOptions
from peftchat.merging.prepare import Job
from peftchat.merging.prompts import load_tokenizer, prompts
from peftchat.merging.reference import FoldedWeights, StoredWeights, trained_token_ids, unmerged_model
from peftchat.merging.report import Verification
from peftchat.merging.shards import Checkpoint
from peftchat.merging.streamed import keep_positions, stream_weights
from peftchat.merging.weights import BaseWeights

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-4, 1e-6),
    torch.float32: (1e-4, 1e-6),
    torch.float16: (1e-2, 1e-4),
    torch.bfloat16: (5e-2, 5e-3),
}
"""Stored type -> largest logit difference as a share of the logits' range, and mean KL divergence in nats: what may be
left after every merged weight was rounded once to the type. `docs/merge.md` has the measurements behind them."""

_LOGIT_BYTES = 96 << 20
_FEWEST_POSITIONS = 64


@dataclass(frozen=True)
class _Batch:
    """Prompts side by side, `[prompts, length]`, padded on the right; `real` is true where there is a token."""

    ids: torch.Tensor
    real: torch.Tensor


def verify_merged(job: Job, folder: Path, options: MergeOptions) -> Verification:
    """Measure the merged model in `folder` against what it was made from.

    Args:
        job: the merge.
        folder: the written model.
        options: the type decides the tolerance, the working set how much is compared at once.
    """
    started = monotonic()
    vocabulary = job.weights.hollow.model.get_input_embeddings().weight.shape[0]
    adapters = [install_adapter(job.base.hollow(), member.config, member.folder) for member in job.members]
    special = trained_token_ids(adapters)
    room = min(_LOGIT_BYTES, options.working_set or _LOGIT_BYTES) // (4 * vocabulary)
    batch = _batch(prompts(job.run, load_tokenizer(folder), special, vocabulary), max(_FEWEST_POSITIONS, room))
    beside = [adapter for adapter, member in zip(adapters, job.members, strict=True) if member.is_rows]
    stock = len(job.members) - len(beside) == 1 and job.members[0].weight == 1.0
    if stock:
        expected = _logits(unmerged_model(adapters[0], job.weights, beside), batch)
    else:
        folded = job.base.hollow()
        stream_weights(folded, FoldedWeights(job.weights, job.plan))
        expected = _logits(folded, batch)
    measured = compare(expected, _logits(_merged_model(job, folder), batch))
    dtype = options.dtype or job.base.config.dtype or torch.float32
    most, most_kl = TOLERANCES[dtype]
    passed = measured.max_difference <= most and measured.kl <= most_kl
    present = set(batch.ids[batch.real].tolist())
    return Verification(
        passed=passed,
        verdict=_verdict(measured, passed, most, most_kl, dtype),
        reference="transformers with PEFT's layers, not merged" if stock else "the base with all updates in float32",
        prompts=len(batch.ids),
        positions=len(expected),
        special_tokens=[index for index in special if index in present],
        max_difference=measured.max_difference,
        mean_difference=measured.mean_difference,
        logit_range=measured.logit_range,
        kl=measured.kl,
        same_greedy=measured.same_greedy,
        tolerance_max=most,
        tolerance_kl=most_kl,
        seconds=monotonic() - started,
    )


def _merged_model(job: Job, folder: Path) -> HollowModel:
    """The merged model as its own files describe it."""
    hollow = build_hollow(read_config(folder), trust_remote_code=job.base.trust_remote_code)
    stream_weights(hollow, StoredWeights(BaseWeights(Checkpoint.open(folder), hollow), {}, {}))
    return hollow


def _batch(found: Sequence[list[int]], positions: int) -> _Batch:
    """Pad the prompts to one matrix, each cut in its middle so that together they have about `positions` tokens."""
    longest = max(2, positions // len(found))
    head, tail = longest - longest // 2, longest // 2
    found = [ids if len(ids) <= longest else ids[:head] + ids[-tail:] for ids in found]
    length = max(len(ids) for ids in found)
    ids = torch.zeros(len(found), length, dtype=torch.long)
    real = torch.zeros(len(found), length, dtype=torch.bool)
    for row, prompt in enumerate(found):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        real[row, : len(prompt)] = True
    return _Batch(ids, real)


def _logits(hollow: HollowModel, batch: _Batch) -> torch.Tensor:
    """Logits of the real positions, float32 `[positions, vocabulary]`."""
    keep_positions(hollow, batch.real)
    with torch.inference_mode():
        result: Any = hollow.model(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False)
    logits: torch.Tensor = result.logits[0].float()
    return logits


def _verdict(measured: Differences, passed: bool, most: float, most_kl: float, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    figures = (
        f"largest logit difference {measured.max_difference:.2e} of the range (allowed for {kind}: {most:.0e}), "
        f"mean KL {measured.kl:.2e} (allowed: {most_kl:.0e}), same next token at {measured.same_greedy:.1%}"
    )
    if passed:
        return f"The merged model computes what base and adapter compute: {figures}."
    return f"The merged model does not compute what base and adapter compute: {figures}."
