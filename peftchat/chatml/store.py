"""Rows on disk: written once as an Arrow stream, read back through the page cache by every process."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from peftchat.chatml.rows import Row, RowBatch

_SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("codes", pa.large_list(pa.uint8())),
        ("source", pa.string()),
        ("lookalikes", pa.int32()),
    ]
)


class RowWriter:
    """Appends batches of rows to a new file; its memory does not grow with the number of rows."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, _SCHEMA)

    def write(self, rows: RowBatch) -> None:
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


class RowStore:
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

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch = self._batches[number]
        place = index - int(self._starts[number])
        return Row(
            _slice(batch["ids"], place),
            _slice(batch["codes"], place),
            batch["source"][place].as_py(),
            batch["lookalikes"][place].as_py(),
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return RowStore, (self.path,)


def _slice(column: pa.LargeListArray, place: int) -> np.ndarray:
    start, stop = column.offsets[place].as_py(), column.offsets[place + 1].as_py()
    values: np.ndarray = column.values.slice(start, stop - start).to_numpy()
    return values
