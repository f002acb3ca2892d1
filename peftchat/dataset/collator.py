"""Collator: encoded examples as the tensors of one batch.

TRL rejects a custom collator together with its own packing, so packs are made in advance (`peftchat.dataset.packing`)
and laid out here.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import (
    IGNORE_INDEX,
    LossOn,
    LossPolicy,
    labels_for,
    loss_mask_table,
    turn_numbers,
)

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore


BatchLayout = Literal["varlen", "packed", "padded"]

Batch = dict[str, Any]
"""A model's arguments by name: tensors, and the lengths that attention kernels take as numbers."""


def cu_seqlens(lengths: Sequence[int], shared: Sequence[int] | None = None) -> Batch:
    """Return the offsets of concatenated sequences as transformers' flash attention takes them.

    Args:
        lengths: tokens of each sequence; empty ones are left out.
        shared: for each sequence, with how many tokens of the one before it begins (`peftchat.models.attention_line`).

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32, shape (sequences + 1,); `max_length_q` and `max_length_k`, numbers.
    """
    import torch

    keys = [length + more for length, more in zip(lengths, shared or [0] * len(lengths), strict=True) if length]
    lengths = [length for length in lengths if length]
    queries_at, keys_at = (torch.tensor([0, *np.cumsum(each)], dtype=torch.int32) for each in (lengths, keys))
    longest = {"max_length_q": max(lengths), "max_length_k": max(keys)}
    return {"cu_seq_lens_q": queries_at, "cu_seq_lens_k": keys_at if shared else queries_at, **longest}


_TAGS, _LAST_TURN = 256, 2**16 - 1


def split_cells(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the example, the turn among those of its role, and the token tag of cells: int64, of the same shape.

    A cell is one number for the targets of an example that have the same turn and tag.
    """
    rest, tags = np.divmod(cells, _TAGS)
    examples, turns = np.divmod(rest, _LAST_TURN + 1)
    return examples, turns, tags


class ChatCollator:
    """Lays out packs of examples as the tensors that a model takes.

    `varlen`: all examples of the batch concatenated, shape (1, N), for attention that takes their offsets
    (`cu_seqlens`). Nothing is padded.
    `packed`: one pack per row, shape (B, T), for attention that builds a mask. Its cost is quadratic in T.
    `padded`: one example per row with an `attention_mask`, shape (B, T). Each pack must hold one example.

    `input_ids`, `labels` and, for the first two, `position_ids` are int64. Positions restart at every conversation, and
    there is no attention mask: transformers builds one that separates conversations, or passes the offsets to the
    kernel. The first token of a conversation is never a target. Padding is on the right; where positions restart, it
    counts as one more conversation.

    `real_tokens` (int64, shape ()) counts the tokens that are not padding, and `attended_pairs` (int64, shape ()) each
    with itself and each token before it in its conversation. `tracked_counts` (int64, shape (2, n)) counts, for each
    tracked token id, its occurrences, and those with a later target in their conversation.

    Args:
        examples: the encoded conversations.
        loss_on: selects the trained tokens.
        layout: see above.
        pad_token_id: fills the padding; never compared with token ids.
        pad_to_multiple_of: round the length up to a multiple of this.
        tracked_token_ids: token ids to count.
    """

    def __init__(
        self,
        examples: "ExampleStore",
        *,
        loss_on: LossPolicy | LossOn,
        layout: BatchLayout,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        tracked_token_ids: Sequence[int] = (),
    ) -> None:
        self.examples = examples
        self.layout = layout
        self._loss_mask = loss_mask_table(loss_on)
        self._pad_token_id = pad_token_id
        self._multiple = pad_to_multiple_of or 1
        self._tracked = np.array(tracked_token_ids, dtype=np.int32)

    @property
    def num_tracked(self) -> int:
        """The number of tracked token ids."""
        return len(self._tracked)

    def __call__(self, packs: Sequence[Mapping[str, Sequence[int]]]) -> Batch:
        """Return the batch of some packs, each of which lists the indices of its examples under `examples`.

        The batch has all their indices, int64, under the same name, their numbers of targets under `target_counts`, and
        how many of them each pack has under `pack_sizes`; arrays, because tensors would be moved to a device where
        nobody reads them.
        """
        batch = self.collate([[self.examples[index] for index in pack["examples"]] for pack in packs])
        indices = [index for pack in packs for index in pack["examples"]]
        batch["examples"] = np.array(indices, dtype=np.int64)
        counts = [np.count_nonzero(self._labels(self.examples[index]) != IGNORE_INDEX) for index in indices]
        batch["target_counts"] = np.array(counts, dtype=np.int64)
        batch["pack_sizes"] = np.array([len(pack["examples"]) for pack in packs], dtype=np.int64)
        return batch

    def keep_first(self, batch: Batch, count: int) -> Batch:
        """Return a batch, as this collator made it, with its first packs alone; with none, it has no targets."""
        sizes = batch["pack_sizes"]
        if count >= len(sizes):
            return batch
        starts = np.cumsum([0, *sizes])
        packs = [{"examples": batch["examples"][start:stop]} for start, stop in itertools.pairwise(starts)]
        kept = self(packs[: max(1, count)])
        if not count:
            kept["labels"].fill_(IGNORE_INDEX)
            kept |= {"examples": np.zeros(0, np.int64), "target_counts": np.zeros(0, np.int64)}
            for name in ("real_tokens", "attended_pairs", "tracked_counts"):
                kept[name].zero_()
        device = batch["labels"].device
        return {name: value.to(device) if hasattr(value, "to") else value for name, value in kept.items()}

    def target_cells(self, packs: Sequence[Mapping[str, Sequence[int]]]) -> np.ndarray:
        """Return the cell of each target of these packs (`split_cells`), in the order of the labels.

        Returns:
            int64, shape (targets,).
        """
        indices = [index for pack in packs for index in pack["examples"]]
        return np.concatenate([np.zeros(0, dtype=np.int64), *(self._cells(index) for index in indices)])

    def _cells(self, index: int) -> np.ndarray:
        example = self.examples[index]
        is_target = self._labels(example) != IGNORE_INDEX
        turns = np.minimum(turn_numbers(example.token_tags)[is_target], _LAST_TURN)
        cells: np.ndarray = (index * (_LAST_TURN + 1) + turns) * _TAGS + example.token_tags[is_target]
        return cells

    def collate(self, packs: Sequence[Sequence[EncodedExample]]) -> Batch:
        """Return the batch of these packs."""
        import torch

        examples = [example for pack in packs for example in pack]
        rows = [examples] if self.layout == "varlen" else packs
        longest = max(sum(len(example.ids) for example in row) for row in rows)
        shape = (len(rows), longest + -longest % self._multiple)
        arrays = {
            "input_ids": np.full(shape, self._pad_token_id, dtype=np.int64),
            "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        }
        if self.layout == "padded":
            arrays["attention_mask"] = np.zeros(shape, dtype=np.int64)
        else:
            arrays["position_ids"] = np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            self._fill({name: array[number] for name, array in arrays.items()}, row)
        batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        lengths = [len(example.ids) for example in examples]
        if self.layout == "varlen":
            batch |= cu_seqlens([*lengths, shape[1] - sum(lengths)])
        batch["real_tokens"] = torch.tensor(sum(lengths))
        batch["attended_pairs"] = torch.tensor(sum(length * (length + 1) // 2 for length in lengths))
        batch["tracked_counts"] = torch.from_numpy(np.sum([self._count_tracked(one) for one in examples], axis=0))
        return batch

    def _fill(self, row: dict[str, np.ndarray], examples: Sequence[EncodedExample]) -> None:
        """Write examples into one row of the batch."""
        start = 0
        for example in examples:
            stop = start + len(example.ids)
            row["input_ids"][start:stop] = example.ids
            row["labels"][start:stop] = self._labels(example)
            if "attention_mask" in row:
                row["attention_mask"][start:stop] = 1
            else:
                row["position_ids"][start:stop] = np.arange(len(example.ids))
            start = stop
        if "position_ids" in row:
            row["position_ids"][start:] = np.arange(len(row["position_ids"]) - start)

    def _labels(self, example: EncodedExample) -> np.ndarray:
        labels = labels_for(example.ids, example.token_tags, self._loss_mask)
        labels[:1] = IGNORE_INDEX
        return labels

    def _count_tracked(self, example: EncodedExample) -> np.ndarray:
        """Count the tracked ids in an example, and those before its last target: int64, shape (2, n)."""
        targets = np.flatnonzero(self._labels(example) != IGNORE_INDEX)
        last = targets[-1] if len(targets) else 0
        occurs = example.ids[None] == self._tracked[:, None]
        return np.stack([occurs.sum(-1), occurs[:, :last].sum(-1)])
