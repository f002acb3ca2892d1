"""The collator: rows to the tensors of one batch.

TRL refuses a custom collator together with its own packing, so packs are made beforehand
(`peftchat.dataset.packing`) and laid out here.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import IGNORE_INDEX, LossOn, labels_for, loss_mask_table

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore


BatchLayout = Literal["flat", "stacked", "padded"]

Batch = dict[str, Any]
"""A model's arguments by name: tensors, and the lengths that kernels want as numbers."""


def borders(lengths: Sequence[int]) -> Batch:
    """Where conversations begin and end in a line, as transformers' flash attention takes it.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32, shape (conversations + 1,), and the greatest length twice, as a
        number.
    """
    import torch

    lengths = [length for length in lengths if length]
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class ChatCollator:
    """Lays out packs of rows as the tensors that a model takes.

    `flat`: every row of the batch behind the other, shape (1, N), for attention that takes conversations one by one;
    their borders come with it (`borders`). Nothing is padded.
    `stacked`: a pack a line, shape (B, T), for attention that builds its mask: its cost is quadratic in T.
    `padded`: a row a line with an `attention_mask`, shape (B, T); packs must hold one row each.

    `input_ids`, `labels` and, for the first two, `position_ids` are int64. Positions restart at every conversation and
    there is no attention mask: transformers then builds one that keeps conversations apart, or hands the borders to the
    kernel. The first token of a conversation is never a target. Padding is on the right; where positions restart it is
    one more conversation.

    `real_tokens` (int64, shape ()) counts the tokens that are not padding. `watched` (int64, shape (2, n)) counts, for
    each token id of interest, its occurrences and those that still have a target behind them in their conversation.

    Args:
        rows: the encoded conversations.
        loss_on: the policy that turns codes into labels.
        layout: see above.
        pad_token_id: id for padding; never compared with anything.
        pad_to_multiple_of: round the length up to a multiple, for kernels that want it.
        watched: token ids to count.
    """

    def __init__(
        self,
        rows: "ExampleStore",
        *,
        loss_on: LossOn,
        layout: BatchLayout,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        watched: Sequence[int] = (),
    ) -> None:
        self.rows = rows
        self.layout = layout
        self._table = loss_mask_table(loss_on)
        self._pad_token_id = pad_token_id
        self._multiple = pad_to_multiple_of or 1
        self._watched = np.array(watched, dtype=np.int32)
        self.watched_count = len(watched)

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> "Batch":
        """The batch of the examples, each of which names the rows of one pack under `rows`."""
        return self.collate([[self.rows[index] for index in example["rows"]] for example in examples])

    def collate(self, packs: Sequence[Sequence[EncodedExample]]) -> "Batch":
        """The batch of these packs."""
        import torch

        rows = [row for pack in packs for row in pack]
        lines = [rows] if self.layout == "flat" else packs
        longest = max(sum(len(row.ids) for row in line) for line in lines)
        shape = (len(lines), longest + -longest % self._multiple)
        arrays = {
            "input_ids": np.full(shape, self._pad_token_id, dtype=np.int64),
            "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        }
        if self.layout == "padded":
            arrays["attention_mask"] = np.zeros(shape, dtype=np.int64)
        else:
            arrays["position_ids"] = np.zeros(shape, dtype=np.int64)
        for number, line in enumerate(lines):
            self._fill({name: array[number] for name, array in arrays.items()}, line)
        batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.layout == "flat":
            lengths = [len(row.ids) for row in rows]
            batch |= borders([*lengths, shape[1] - sum(lengths)])
        batch["real_tokens"] = torch.tensor(sum(len(row.ids) for row in rows))
        batch["watched"] = torch.from_numpy(np.sum([self._count(row) for row in rows], axis=0))
        return batch

    def _fill(self, line: dict[str, np.ndarray], rows: Sequence[EncodedExample]) -> None:
        """Write rows into one line of the batch."""
        start = 0
        for row in rows:
            stop = start + len(row.ids)
            line["input_ids"][start:stop] = row.ids
            line["labels"][start:stop] = self._labels(row)
            if "attention_mask" in line:
                line["attention_mask"][start:stop] = 1
            else:
                line["position_ids"][start:stop] = np.arange(len(row.ids))
            start = stop
        if "position_ids" in line:
            line["position_ids"][start:] = np.arange(len(line["position_ids"]) - start)

    def _labels(self, row: EncodedExample) -> np.ndarray:
        labels = labels_for(row.ids, row.token_tags, self._table)
        labels[:1] = IGNORE_INDEX
        return labels

    def _count(self, row: EncodedExample) -> np.ndarray:
        """Occurrences of the watched ids in a row, and those before its last target: int64, shape (2, n)."""
        targets = np.flatnonzero(self._labels(row) != IGNORE_INDEX)
        last = targets[-1] if len(targets) else 0
        occurs = row.ids[None] == self._watched[:, None]
        return np.stack([occurs.sum(-1), occurs[:, :last].sum(-1)])
