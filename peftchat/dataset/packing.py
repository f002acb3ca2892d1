"""Packing: grouping examples into sequences of a fixed capacity.

Best-fit decreasing: the longest examples first, each into the fullest pack that still has space. On conversation
lengths this leaves well under one percent of a long sequence empty.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CHUNK = 2**16
"""Lengths that are converted to Python numbers at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Packs(Sequence[list[int]]):
    """The example indices of each pack, in four bytes per example.

    Attributes:
        examples: the indices of all packs concatenated, int32, shape (N,).
        offsets: the start of each pack, and the end of the last one, int64, shape (P + 1,).
    """

    examples: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        indices: list[int] = self.examples[self.offsets[index] : self.offsets[index + 1]].tolist()
        return indices


def pack(lengths: npt.NDArray[np.int64], capacity: int, seed: int | Sequence[int]) -> Packs:
    """Group examples into packs of at most `capacity` tokens.

    Args:
        lengths: tokens of each example, int64, shape (N,).
        capacity: tokens that fit into one pack.
        seed: one number or several; shuffles examples of equal length, and so decides which of them share a pack.

    Returns:
        The example indices of each pack; every example occurs exactly once.

    Raises:
        ValueError: an example is longer than the capacity.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an example of {int(lengths.max())} tokens does not fit into {capacity}")
    order = np.random.default_rng(seed).permutation(np.arange(len(lengths), dtype=np.int32))
    order = order[np.argsort(-lengths[order], kind="stable")]
    pack_of = np.empty(len(order), dtype=np.int32)  # the pack of each example, in that order
    count = 0
    packs_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> packs
    # Bit n is set if some pack has exactly n free tokens: the best fit is the lowest set bit at or above the length.
    spaces = 0
    for position, length in enumerate(_numbers(lengths, order)):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            target = packs_by_space[space].pop()
            if not packs_by_space[space]:
                spaces &= ~(1 << space)
        else:
            space = capacity
            target = count
            count += 1
        pack_of[position] = target
        left = space - length
        packs_by_space[left].append(target)
        spaces |= 1 << left
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=count), out=offsets[1:])
    return Packs(order[np.argsort(pack_of, kind="stable")], offsets)


def _numbers(lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int32]) -> Iterator[int]:
    """Yield the lengths in an order, converting a part of them at a time."""
    for start in range(0, len(order), _CHUNK):
        yield from lengths[order[start : start + _CHUNK]].tolist()


def split_largest(packs: Packs, number: int) -> Packs:
    """Split the packs of most examples in two until there are `number` of them, or each has one example."""
    if len(packs) >= number:
        return packs
    # The second half of a pack becomes a pack behind all others.
    parts = [packs.examples[start:stop] for start, stop in itertools.pairwise(packs.offsets.tolist())]
    heap = [(-len(part), place) for place, part in enumerate(parts)]
    heapq.heapify(heap)
    while len(parts) < number and -heap[0][0] > 1:
        _, place = heapq.heappop(heap)
        first, second = np.array_split(parts[place], 2)
        parts[place] = first
        parts.append(second)
        heapq.heappush(heap, (-len(first), place))
        heapq.heappush(heap, (-len(second), len(parts) - 1))
    return _joined(parts)


def keep_fullest(packs: Packs, number: int, lengths: npt.NDArray[np.int64]) -> Packs:
    """Leave out the packs with the fewest tokens, so that at most `number` are left, in their order.

    Args:
        packs: the packs.
        number: how many may be left.
        lengths: tokens of each example, int64, shape (N,).
    """
    if len(packs) <= number:
        return packs
    sums = np.add.reduceat(lengths[packs.examples], packs.offsets[:-1])
    kept = np.sort(np.argsort(-sums, kind="stable")[:number])
    return _joined([packs.examples[packs.offsets[place] : packs.offsets[place + 1]] for place in kept])


def _joined(parts: Sequence[npt.NDArray[np.int32]]) -> Packs:
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Packs(np.concatenate([np.zeros(0, np.int32), *parts]), offsets)


def efficiency(packs: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64], capacity: int) -> float:
    """Return the fraction of the packs' capacity that holds tokens, 0 to 1."""
    return float(lengths.sum()) / (len(packs) * capacity) if packs else 0.0
