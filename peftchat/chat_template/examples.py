"""Encoded conversations, one by one and as flat batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

TokenIds = npt.NDArray[np.int32]
"""Token ids of one or more examples."""
TokenTags = npt.NDArray[np.uint8]
"""For each token, which part of which role's turn it is (`peftchat.chat_template.loss_mask`)."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One encoded conversation.

    Attributes:
        ids: token ids, int32, shape (T,).
        codes: what each token is (`peftchat.chat_template.loss_mask`), uint8, shape (T,).
        source: where the conversation came from, `file:line`.
        lookalikes: stretches of its messages spelled like a special token, encoded as ordinary text.
    """

    ids: TokenIds
    codes: TokenTags
    source: str
    lookalikes: int


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Rows laid end to end, so that counting and writing them takes a few array operations.

    Attributes:
        ids: token ids of all rows, int32, shape (T,).
        codes: what each token is, uint8, shape (T,).
        offsets: where each row begins, and the end of the last one, int64, shape (N + 1,).
        sources: of each row, `file:line`.
        lookalikes: of each row, int32, shape (N,).
    """

    ids: TokenIds
    codes: TokenTags
    offsets: npt.NDArray[np.int64]
    sources: Sequence[str]
    lookalikes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[EncodedExample]) -> "ExampleBatch":
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

    def __getitem__(self, index: int) -> EncodedExample:
        start, stop = self.offsets[index], self.offsets[index + 1]
        return EncodedExample(
            self.ids[start:stop], self.codes[start:stop], self.sources[index], int(self.lookalikes[index])
        )

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[index] for index in range(len(self)))


_SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("codes", pa.large_list(pa.uint8())),
        ("source", pa.string()),
        ("lookalikes", pa.int32()),
    ]
)


class ExampleWriter:
    """Appends batches of rows to a new file; its memory does not grow with the number of rows."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, _SCHEMA)

    def write(self, rows: ExampleBatch) -> None:
        """Append these rows as one batch."""
        if not len(rows):
            return
        columns = [
            pa.LargeListArray.from_arrays(rows.offsets, rows.ids),
            pa.LargeListArray.from_arrays(rows.offsets, rows.codes),
            pa.array(rows.sources, pa.string()),
            pa.array(rows.lookalikes),
        ]
        self._stream.write_batch(pa.record_batch(columns, schema=_SCHEMA))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._sink.close()


class ExampleStore:
    """The rows of one file, mapped into memory. Can be sent to worker processes; they map the file again.

    Attributes:
        lengths: tokens of each row, int64, shape (N,).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source:
            self._batches = pa.ipc.open_stream(source).read_all().to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.lengths: npt.NDArray[np.int64] = np.concatenate(
            [np.zeros(0, np.int64), *(np.diff(batch["ids"].offsets.to_numpy()) for batch in self._batches)]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> EncodedExample:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch = self._batches[number]
        place = index - int(self._starts[number])
        return EncodedExample(
            _slice(batch["ids"], place),
            _slice(batch["codes"], place),
            batch["source"][place].as_py(),
            batch["lookalikes"][place].as_py(),
        )

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleStore, (self.path,)


def _slice(column: pa.LargeListArray, place: int) -> np.ndarray:
    start, stop = column.offsets[place].as_py(), column.offsets[place + 1].as_py()
    values: np.ndarray = column.values.slice(start, stop - start).to_numpy()
    return values
