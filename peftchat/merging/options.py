"""What the user may choose about a merge."""

from dataclasses import dataclass
from pathlib import Path

import torch

from peftchat.merging.choose_base import BaseMode

DEFAULT_BLOCK = 64 << 20
"""Bytes of memory for one block of rows where the user sets no working set; larger blocks are not faster."""


@dataclass(frozen=True)
class MergeOptions:
    """The choices.

    Attributes:
        out: the merged model's folder; None for `RUN/merged`.
        base: which weights the adapter is folded into, for a run on a quantised base.
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
