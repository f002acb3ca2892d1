"""Held-out targets: the losses of one evaluation by conversation, turn, role and kind of text."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.loss_mask import TARGET_KINDS, role_of, target_kind_table
from peftchat.dataset.collator import split_cells
from peftchat.runs.eval_losses import ConversationLoss, PartLoss, add_before, read_eval_losses, write_eval_losses

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore
    from peftchat.training.context import TrainContext


@dataclass(frozen=True, slots=True)
class HeldOutCase:
    """The loss of a held-out conversation, preference pair or labeled answer.

    Attributes:
        weight: the targets of a conversation; 1 for a pair or an answer.
        loss: in nats, times the weight.
        right: of a pair or an answer, 1 if its reward says what the data say, a half if it says neither.
    """

    weight: float
    loss: float
    right: float | None = None


@dataclass
class HeldOutLosses:
    """The losses of this process's part of an evaluation, summed by cell (`peftchat.dataset.collator.split_cells`)."""

    _cells: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _counts: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _sums: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, cells: npt.NDArray[np.int64], losses: npt.NDArray[np.float64]) -> None:
        """Add the targets of a batch.

        Args:
            cells: the cell of each target, shape (N,).
            losses: its negative log-likelihood in nats, shape (N,).
        """
        found, places, counts = np.unique(cells, return_inverse=True, return_counts=True)
        self._cells.append(found)
        self._counts.append(counts.astype(np.int64))
        self._sums.append(np.bincount(places, weights=losses, minlength=len(found)).astype(np.float64))

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return cells, and the number and the summed loss of the targets of each."""
        return (
            np.concatenate([np.zeros(0, np.int64), *self._cells]),
            np.concatenate([np.zeros(0, np.int64), *self._counts]),
            np.concatenate([np.zeros(0, np.float64), *self._sums]),
        )

    def by_kind(self) -> npt.NDArray[np.float64]:
        """Return the loss and the number of the targets of each of `TARGET_KINDS`, shape (2, kinds)."""
        cells, counts, sums = self.arrays()
        kinds = target_kind_table()[split_cells(cells)[2]]
        rows = [np.bincount(kinds, weights=values, minlength=len(TARGET_KINDS)) for values in (sums, counts)]
        return np.stack(rows).astype(np.float64)

    def conversations(self, store: "ExampleStore", gather: Callable[[Any], list[Any]]) -> list[ConversationLoss]:
        """Return the losses of all processes by conversation, in the order of the store; every process must call it.

        Consecutive examples of one record are one conversation.
        """
        parts = gather(self.arrays())
        cells, counts, sums = (np.concatenate(values) for values in zip(*parts, strict=True))
        order = np.argsort(cells, kind="stable")
        examples, turns, tags = split_cells(cells[order])
        kinds = list(TARGET_KINDS)
        kind_numbers = target_kind_table()[tags]
        rows = zip(
            examples.tolist(), turns.tolist(), tags.tolist(), kind_numbers.tolist(),
            counts[order].tolist(), sums[order].tolist(), strict=True,
        )  # fmt: skip
        sourced = ((store[row[0]].source, row) for row in rows)
        found = []
        for source, of_source in itertools.groupby(sourced, key=lambda pair: pair[0]):
            merged: dict[tuple[str | None, int, str], tuple[int, float]] = {}
            length = 0
            for _, (example, turn, tag, kind, count, loss) in of_source:
                key = (role_of(tag), turn, kinds[kind])
                tokens, total = merged.get(key, (0, 0.0))
                merged[key] = (tokens + count, total + loss)
                length = max(length, int(store.lengths[example]))
            found.append(ConversationLoss(source, length, tuple(PartLoss(*key, *sums) for key, sums in merged.items())))
        return found


def write_losses(
    losses: HeldOutLosses, context: "TrainContext", gather: Callable[[Any], list[Any]], *, before: bool
) -> Sequence[ConversationLoss]:
    """Write the losses of an evaluation into the run folder, beside those before the first step.

    Every process must call it.

    Args:
        losses: of this process's part.
        context: the run.
        gather: returns the values of all processes.
        before: whether they are those before the first step.

    Returns:
        The losses of all processes.
    """
    found = losses.conversations(context.splits["eval"].store, gather)
    if not context.is_main:
        return found
    path = context.run_folder.eval_losses
    found = [one.as_before() for one in found] if before else add_before(found, read_eval_losses(path))
    write_eval_losses(path, found)
    return found
