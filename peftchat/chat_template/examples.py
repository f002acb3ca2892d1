"""Encoded conversations: single examples, flat batches, and the Arrow files that store them."""

import itertools
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
        token_tags: for each token its role and turn part (`peftchat.chat_template.loss_mask`), uint8, shape (T,).
        source: where the conversation came from, `file:line`.
        special_token_text: occurrences of text in its messages that is spelled like a special token. It is encoded as
            ordinary text.
    """

    ids: TokenIds
    token_tags: TokenTags
    source: str
    special_token_text: int


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Examples in flat arrays, one after the other, so that a few array operations count and write them.

    Attributes:
        ids: token ids of all examples, int32, shape (T,).
        token_tags: their tags, uint8, shape (T,).
        offsets: the index at which each example starts, and the end of the last one, int64, shape (N + 1,).
        sources: of each example, `file:line`.
        special_token_text: of each example, int32, shape (N,).
        owners: the number of the conversation that each example is of, int64, shape (N,); None where each conversation
            has one.
    """

    ids: TokenIds
    token_tags: TokenTags
    offsets: npt.NDArray[np.int64]
    sources: Sequence[str]
    special_token_text: npt.NDArray[np.int32]
    owners: Sequence[int] | None = None

    @classmethod
    def of(cls, examples: Sequence[EncodedExample], owners: Sequence[int] | None = None) -> "ExampleBatch":
        """Return the batch of these examples."""
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(example.ids for example in examples)]),
            np.concatenate([np.zeros(0, np.uint8), *(example.token_tags for example in examples)]),
            np.cumsum([0, *(len(example.ids) for example in examples)], dtype=np.int64),
            [example.source for example in examples],
            np.array([example.special_token_text for example in examples], dtype=np.int32),
            owners,
        )

    def by_conversation(self) -> Iterator[tuple[int, list[EncodedExample]]]:
        """Yield each conversation's number and its examples."""
        owners = range(len(self)) if self.owners is None else self.owners
        for owner, examples in itertools.groupby(zip(owners, self, strict=True), key=lambda pair: pair[0]):
            yield owner, [example for _, example in examples]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each example, shape (N,)."""
        return np.diff(self.offsets)

    def counts(self, table: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Count the tokens of each example whose tag the table selects. The first token is never a target.

        Args:
            table: the tags to count, bool, shape (256,).

        Returns:
            int64, shape (N,).
        """
        before = np.concatenate([[0], np.cumsum(table[self.token_tags], dtype=np.int64)])
        return before[self.offsets[1:]] - before[np.minimum(self.offsets[:-1] + 1, self.offsets[1:])]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> EncodedExample:
        start, stop = self.offsets[index], self.offsets[index + 1]
        tags, special_token_text = self.token_tags[start:stop], int(self.special_token_text[index])
        return EncodedExample(self.ids[start:stop], tags, self.sources[index], special_token_text)

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[index] for index in range(len(self)))


_SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("token_tags", pa.large_list(pa.uint8())),
        ("source", pa.string()),
        ("special_token_text", pa.int32()),
    ]
)


class ExampleWriter:
    """Appends batches to a new file. Its memory does not grow with the number of examples."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, _SCHEMA)

    def write(self, batch: ExampleBatch) -> None:
        """Append one batch."""
        if not len(batch):
            return
        columns = [
            pa.LargeListArray.from_arrays(batch.offsets, batch.ids),
            pa.LargeListArray.from_arrays(batch.offsets, batch.token_tags),
            pa.array(batch.sources, pa.string()),
            pa.array(batch.special_token_text),
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
    """The examples of one file, mapped into memory. Worker processes that get a store map the file again.

    Attributes:
        lengths: the number of tokens of each example, int64, shape (N,).
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

    def arrays(self) -> Iterator[tuple[TokenIds, TokenTags, npt.NDArray[np.int64]]]:
        """Yield ids, token tags and offsets of the examples in flat arrays, batch by batch."""
        for batch in self._batches:
            offsets = batch["ids"].offsets.to_numpy()
            start, stop = offsets[0], offsets[-1]
            yield (
                batch["ids"].values.slice(start, stop - start).to_numpy(),
                batch["token_tags"].values.slice(start, stop - start).to_numpy(),
                offsets - start,
            )

    def __getitem__(self, index: int) -> EncodedExample:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch = self._batches[number]
        index -= int(self._starts[number])
        return EncodedExample(
            _slice(batch["ids"], index),
            _slice(batch["token_tags"], index),
            batch["source"][index].as_py(),
            batch["special_token_text"][index].as_py(),
        )

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleStore, (self.path,)


def _slice(column: pa.LargeListArray, index: int) -> np.ndarray:
    start, stop = column.offsets[index].as_py(), column.offsets[index + 1].as_py()
    values: np.ndarray = column.values.slice(start, stop - start).to_numpy()
    return values
