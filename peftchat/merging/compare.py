"""Figures for how far two sets of logits are apart."""

from dataclasses import dataclass

import torch

_ROWS = 64


@dataclass(frozen=True)
class Differences:
    """See `report.Verification` for what each figure means."""

    max_difference: float
    mean_difference: float
    logit_range: float
    kl: float
    same_greedy: float


def compare(expected: torch.Tensor, found: torch.Tensor) -> Differences:
    """Compare logits `[positions, vocabulary]`, a few positions at a time. A NaN on either side makes NaN figures."""
    spread = float(expected.max() - expected.min())
    largest = total = divergence = 0.0
    same = 0
    for start in range(0, len(expected), _ROWS):
        left, right = expected[start : start + _ROWS], found[start : start + _ROWS]
        apart = (left - right).abs()
        largest = max(largest, float(apart.max())) if not apart.isnan().any() else float("nan")
        total += float(apart.sum(dtype=torch.float64))
        log_left, log_right = left.double().log_softmax(-1), right.double().log_softmax(-1)
        divergence += float((log_left.exp() * (log_left - log_right)).sum())
        same += int((left.argmax(-1) == right.argmax(-1)).sum())
    count = len(expected)
    return Differences(
        max_difference=largest / spread,
        mean_difference=total / expected.numel() / spread,
        logit_range=spread,
        kl=max(0.0, divergence / count),
        same_greedy=same / count,
    )
