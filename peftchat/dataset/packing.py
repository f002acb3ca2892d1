"""Packing: which rows share a sequence.

Best-fit decreasing: the longest rows first, each into the fullest sequence that still has room. On conversation
lengths this leaves well under one percent of a long sequence empty.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CHUNK = 2**16
"""Rows that are Python numbers at one time."""


@dataclass(frozen=True, slots=True, eq=False)
class Packs(Sequence[list[int]]):
    """The row numbers of each sequence, in four bytes a row.

    Attributes:
        rows: those of all sequences one after the other, int32, shape (N,).
        offsets: where each sequence begins, and the end of the last one, int64, shape (P + 1,).
    """

    rows: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        numbers: list[int] = self.rows[self.offsets[index] : self.offsets[index + 1]].tolist()
        return numbers


def pack(lengths: npt.NDArray[np.int64], capacity: int, seed: int) -> Packs:
    """Group rows into sequences of at most `capacity` tokens.

    Args:
        lengths: tokens of each row, int64, shape (N,).
        capacity: tokens that fit in one sequence.
        seed: orders rows of equal length, and so decides which of them meet.

    Returns:
        The row numbers of each sequence; every row occurs exactly once.

    Raises:
        ValueError: a row is longer than the capacity.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row of {int(lengths.max())} tokens does not fit into {capacity}")
    order = np.random.default_rng(seed).permutation(np.arange(len(lengths), dtype=np.int32))
    order = order[np.argsort(-lengths[order], kind="stable")]
    chosen = np.empty(len(order), dtype=np.int32)  # the sequence of each row, in that order
    count = 0
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> sequences
    # Bit r is set where some sequence has exactly r tokens free: the best fit is the lowest bit at or above the length.
    rooms = 0
    for place, length in enumerate(_numbers(lengths, order)):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            target = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room = capacity
            target = count
            count += 1
        chosen[place] = target
        left = room - length
        with_room[left].append(target)
        rooms |= 1 << left
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(chosen, minlength=count), out=offsets[1:])
    return Packs(order[np.argsort(chosen, kind="stable")], offsets)


def _numbers(lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int32]) -> Iterator[int]:
    for start in range(0, len(order), _CHUNK):
        yield from lengths[order[start : start + _CHUNK]].tolist()


def efficiency(packs: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64], capacity: int) -> float:
    """The share of the sequences' capacity that holds tokens, 0 to 1."""
    return float(lengths.sum()) / (len(packs) * capacity) if packs else 0.0
