"""Packing: which rows share a sequence.

Best-fit decreasing: the longest rows first, each into the fullest sequence that still has room. On dialogue
lengths this leaves well under one percent of a long sequence empty.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pack(lengths: npt.NDArray[np.int64], capacity: int, seed: int) -> list[list[int]]:
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
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> packs
    # Bit r is set where some pack has exactly r tokens free: the best fit is the lowest bit at or above the length.
    rooms = 0
    for row in order:
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            target = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room = capacity
            target = len(packs)
            packs.append([])
        packs[target].append(int(row))
        left = room - length
        with_room[left].append(target)
        rooms |= 1 << left
    return packs


def efficiency(packs: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64], capacity: int) -> float:
    """The share of the sequences' capacity that holds tokens, 0 to 1."""
    return float(lengths.sum()) / (len(packs) * capacity) if packs else 0.0
