"""What a merge did and how close the result is, as `merge_report.json`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from peftchat.merging.choose_base import BaseChoice

NAME = "merge_report.json"


@dataclass(frozen=True)
class Verification:
    """The merged model against base + adapter, both computed in float32, on the same prompts.

    Attributes:
        passed: every figure is within its tolerance.
        verdict: one sentence.
        reference: what stood for base + adapter.
        prompts, positions: how much was compared.
        special_tokens: ids with trained rows that occur in the prompts.
        max_difference, mean_difference: of two logits, as a share of the range of the reference's logits.
        logit_range: largest minus smallest logit of the reference.
        kl: mean Kullback-Leibler divergence, reference to merged, in nats a position.
        same_greedy: share of positions where both sides would choose the same next token.
        tolerance_max, tolerance_kl: the limits for `max_difference` and `kl`, by the type of the merged weights.
    """

    passed: bool
    verdict: str
    reference: str
    prompts: int
    positions: int
    special_tokens: list[int]
    max_difference: float
    mean_difference: float
    logit_range: float
    kl: float
    same_greedy: float
    tolerance_max: float
    tolerance_kl: float
    seconds: float


@dataclass(frozen=True)
class MergeReport:
    """A merge.

    Attributes:
        base: hub id or folder of the base.
        adapters: folder and weight of each adapter.
        choice: which weights of the base, with the measured distances for a quantised run.
        dtype: type of the merged weights.
        tensors, bytes: all that was written; `folded_bytes` of it changed.
        shards: how many files; `resumed_shards` of them were there from an earlier start.
        vocabulary: rows of the input embedding; `grown` of them the base did not have.
        tied: the output head shares the embedding's weight.
        method: the PEFT method of each adapter.
        verification: None if it was switched off.
    """

    base: str
    adapters: list[tuple[str, float]]
    method: list[str]
    choice: BaseChoice
    dtype: str
    tensors: int
    bytes: int
    folded_bytes: int
    shards: int
    resumed_shards: int
    vocabulary: int
    grown: int
    tied: bool
    seconds: float
    versions: dict[str, str]
    verification: Verification | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def write(folder: Path, report: MergeReport) -> None:
    """Write `merge_report.json` into `folder`."""
    (folder / NAME).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
