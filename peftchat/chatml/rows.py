"""Encoded conversations, one by one and as flat batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftchat.chatml.mask import Codes, Ids


@dataclass(frozen=True, slots=True)
class Row:
    """One encoded conversation.

    Attributes:
        ids: token ids, int32, shape (T,).
        codes: what each token is (`peftchat.chatml.mask`), uint8, shape (T,).
        source: where the conversation came from, `file:line`.
        lookalikes: stretches of its messages spelled like a special token, encoded as ordinary text.
    """

    ids: Ids
    codes: Codes
    source: str
    lookalikes: int


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows laid end to end, so that counting and writing them takes a few array operations.

    Attributes:
        ids: token ids of all rows, int32, shape (T,).
        codes: what each token is, uint8, shape (T,).
        offsets: where each row begins, and the end of the last one, int64, shape (N + 1,).
        sources: of each row, `file:line`.
        lookalikes: of each row, int32, shape (N,).
    """

    ids: Ids
    codes: Codes
    offsets: npt.NDArray[np.int64]
    sources: Sequence[str]
    lookalikes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "RowBatch":
        """The batch of these rows."""
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(row.ids for row in rows)]),
            np.concatenate([np.zeros(0, np.uint8), *(row.codes for row in rows)]),
            np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64),
            [row.source for row in rows],
            np.array([row.lookalikes for row in rows], dtype=np.int32),
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, shape (N,)."""
        return np.diff(self.offsets)

    def counts(self, wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """How many tokens of each row are wanted, behind its first one.

        Args:
            wanted: which codes to count, bool, shape (256,).

        Returns:
            int64, shape (N,).
        """
        before = np.concatenate([[0], np.cumsum(wanted[self.codes], dtype=np.int64)])
        return before[self.offsets[1:]] - before[np.minimum(self.offsets[:-1] + 1, self.offsets[1:])]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Row:
        start, stop = self.offsets[index], self.offsets[index + 1]
        return Row(self.ids[start:stop], self.codes[start:stop], self.sources[index], int(self.lookalikes[index]))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))
