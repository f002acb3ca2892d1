"""Line: conversations side by side in one row, and the slots in which attention computes them on a CPU.

A conversation with more keys than queries is a branch: it goes on from the first tokens of the conversation before it.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

# Longer conversations are computed alone. Computing several together would only take more memory.
_MAX_GROUPED_LENGTH = 256
# Matrix kernels are fastest on lengths that fill their registers.
_ALIGNMENT = 32
# A conversation joins a group of longer ones if padding it to their length costs less than computing it apart.
_MIN_LENGTH_RATIO = 0.75


# Lines are compared by identity: slices have no hash.
@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line of conversations.

    Attributes:
        length: its tokens.
        conversations: the place of each one's own tokens, and of those that it shares; None for one that shares none.
    """

    length: int
    conversations: tuple[tuple[slice, slice | None], ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First token and one past the last of each conversation that is no branch."""
        return [(own.start, own.stop) for own, shared in self.conversations if shared is None]

    @property
    def branches(self) -> list[tuple[slice, slice]]:
        """The own tokens of each branch, and the shared ones."""
        return [(own, shared) for own, shared in self.conversations if shared is not None]

    def key_places(self) -> Tensor:
        """Return the place of each key, with the shared ones once more in front of each branch: int64."""
        parts = [part for own, shared in self.conversations for part in (shared, own) if part is not None]
        return torch.cat([torch.arange(part.start, part.stop) for part in parts])


def line_of(cu_seqlens: Tensor, cu_keys: Tensor) -> Line:
    """Return the line with these boundaries of queries and of keys; every layer of a forward pass gets the same one.

    Args:
        cu_seqlens: cumulative lengths of the conversations, from 0, int32, shape (conversations + 1,).
        cu_keys: the same of their keys.
    """
    return _line(tuple(cu_seqlens.tolist()), tuple(cu_keys.tolist()))


@functools.lru_cache(maxsize=8)
def _line(cu_seqlens: tuple[int, ...], cu_keys: tuple[int, ...]) -> Line:
    found: list[tuple[slice, slice | None]] = []
    before = 0
    for (start, stop), (first, end) in zip(itertools.pairwise(cu_seqlens), itertools.pairwise(cu_keys), strict=True):
        number = (end - first) - (stop - start)
        if stop > start:
            found.append((slice(start, stop), slice(before, before + number) if number else None))
        before = start
    return Line(cu_seqlens[-1], tuple(found))


@dataclass(frozen=True, slots=True)
class Group:
    """Conversations that are computed together, each padded to the same length.

    Attributes:
        first: their first slot.
        count: conversations.
        length: slots of each conversation.
    """

    first: int
    count: int
    length: int

    def view(self, rows: Tensor, heads: int) -> Tensor:
        """Return the group's part of gathered rows: shape (count, heads, length, D)."""
        stop = self.first + self.count * self.length
        return rows[self.first * heads : stop * heads].view(self.count, heads, self.length, rows.shape[1])


@dataclass(frozen=True, slots=True)
class PaddedGroups:
    """A line of conversations as groups of slots. A slot holds one token or padding.

    Attributes:
        groups: in the order of their slots.
        tokens: for each slot the index of its token, int64, shape (slots,). Padding repeats a conversation's last one.
        slots: for each token the index of its slot, int64, shape (N,); any one for those of branches.
        padding: whether a slot is padding, bool, shape (slots,).
    """

    groups: tuple[Group, ...]
    tokens: Tensor
    slots: Tensor
    padding: Tensor


@dataclass(frozen=True, slots=True)
class GatherIndex:
    """Indices between (heads, N, D) tensors and matrices in which the heads and slots of a group are contiguous.

    Attributes:
        sources: for each row of the matrix the index of its vector among (N, heads), int32, shape (slots * heads,).
        rows: for each vector of (N, heads) the index of its row, int32, shape (N * heads,).
        padding: indices of the rows that are padding, int64.
    """

    sources: Tensor
    rows: Tensor
    padding: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the matrix of a (heads, N, D) tensor: shape (slots * heads, D)."""
        return tensor.transpose(0, 1).reshape(-1, tensor.shape[2]).index_select(0, self.sources)

    def restore(self, matrix: Tensor, heads: int) -> Tensor:
        """Return the (heads, N, D) tensor of such a matrix."""
        return matrix.index_select(0, self.rows).view(-1, heads, matrix.shape[1]).transpose(0, 1)


# Every layer of a forward pass needs the same groups.
@functools.lru_cache(maxsize=8)
def padded_groups(line: Line) -> PaddedGroups:
    """Return the conversations of a line that are no branches, in groups of similar length."""
    longest_first = sorted(line.spans, key=lambda span: span[0] - span[1])
    groups: list[Group] = []
    tokens_of_groups = []
    first = 0
    for spans in _group_by_length(longest_first):
        longest = spans[0][1] - spans[0][0]
        length = -(-longest // _ALIGNMENT) * _ALIGNMENT if longest > _ALIGNMENT else longest
        starts = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([stop - start for start, stop in spans])[:, None]
        tokens_of_groups.append((starts + torch.minimum(torch.arange(length), lengths - 1)).flatten())
        groups.append(Group(first, len(spans), length))
        first += len(spans) * length
    tokens = torch.cat(tokens_of_groups)
    real = torch.ones(len(tokens), dtype=torch.bool)
    # The first slot with a token is its own. The slots right behind it that repeat the token are padding.
    real[1:] = tokens[1:] != tokens[:-1]
    # Branches are computed apart, and their tokens have no slot.
    slots = torch.zeros(line.length, dtype=torch.int64)
    slots[tokens[real]] = torch.nonzero(real)[:, 0]
    return PaddedGroups(tuple(groups), tokens, slots, ~real)


def _group_by_length(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group conversations of similar length, given and returned longest first. Long ones stay alone."""
    groups: list[list[tuple[int, int]]] = []
    for start, stop in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if groups and longest <= _MAX_GROUPED_LENGTH and stop - start >= _MIN_LENGTH_RATIO * longest:
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    return groups


# One for queries and one for keys, of this batch and the next. They are large.
@functools.lru_cache(maxsize=4)
def gather_index(line: Line, heads: int) -> GatherIndex:
    """Return the indices between tensors with so many heads and the matrices of a line's groups."""
    padded = padded_groups(line)
    # For each group a (count, heads, length) block of vectors, each identified by slot * heads + head.
    vectors = torch.arange(len(padded.tokens) * heads).view(-1, heads)
    blocks = [
        vectors[group.first : group.first + group.count * group.length]
        .view(group.count, group.length, heads)
        .transpose(1, 2)
        .flatten()
        for group in padded.groups
    ]
    order = torch.cat(blocks)
    slot, head = order // heads, order % heads
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order))
    return GatherIndex(
        sources=(padded.tokens[slot] * heads + head).int(),
        rows=rows.view(-1, heads)[padded.slots].flatten().int(),
        padding=torch.nonzero(padded.padding[slot])[:, 0],
    )
