"""The parameters of a model, read from its checkpoint when they are asked for."""

from collections.abc import Callable, Iterator, Mapping

import torch

from peftchat.merging.hollow import HollowModel
from peftchat.merging.layout import Layout, match_layout
from peftchat.merging.shards import Checkpoint, Entry, read_rows

RoundTrip = Callable[[torch.Tensor], torch.Tensor]
"""A parameter's stored weights -> the weights as they were while training (same shape and type)."""

_BLOCK_BYTES = 64 << 20


class BaseWeights:
    """Weights of `hollow`, by parameter name, out of `checkpoint`.

    Rows that the model has and the checkpoint has not (a grown vocabulary) read as the mean of the checkpoint's rows.

    Args:
        checkpoint: where the weights lie.
        hollow: the model whose parameters are asked for.
        round_trip: what quantisation did to the base while training, by parameter; none for the base as it is.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hollow: HollowModel,
        *,
        round_trip: Mapping[str, RoundTrip] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.hollow = hollow
        self.layout: Layout = match_layout(checkpoint, hollow)
        self._round_trip = round_trip or {}
        self._means: dict[str, torch.Tensor] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def source(self, name: str) -> str:
        """The parameter that holds the weight of `name`: itself, or the one it is tied to."""
        return self.hollow.ties.get(name, name)

    @property
    def round_tripped(self) -> frozenset[str]:
        """The parameters that were quantised while training."""
        return frozenset(self._round_trip)

    def in_blocks(self, name: str) -> bool:
        """Whether rows can be had without holding the whole parameter."""
        return name not in self._round_trip and name not in self.layout.fusion_of

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a parameter."""
        name = self.source(name)
        fusion = self.layout.fusion_of.get(name)
        key = fusion.keys[0] if fusion else self.layout.key_of[name]
        return self.checkpoint.entries[key].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a parameter in its stored type; tied names read what they are tied to."""
        name = self.source(name)
        if not self.in_blocks(name):
            return self._whole(name)[start:stop]
        return self._stored_rows(name, start, self.hollow.slots[name].shape[0] if stop is None else stop)

    def _stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        entry = self.checkpoint.entries[self.layout.key_of[name]]
        if not entry.shape or stop <= entry.rows:
            return read_rows(entry, start, stop if entry.shape else None)
        old = read_rows(entry, start, entry.rows) if start < entry.rows else None
        count = stop - max(start, entry.rows)
        new = self._mean(entry).expand(count, *entry.shape[1:])
        return new.contiguous() if old is None else torch.cat([old, new])

    def _whole(self, name: str) -> torch.Tensor:
        # One layer's weights are asked for in a row, by block: the last one is kept, never more.
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._make_whole(name))
        return self._last[1]

    def _make_whole(self, name: str) -> torch.Tensor:
        fusion = self.layout.fusion_of.get(name)
        if fusion is not None:
            return fusion.fuse(lambda key: read_rows(self.checkpoint.entries[key]))[name]
        stored = self._stored_rows(name, 0, self.hollow.slots[name].shape[0])
        return self._round_trip[name](stored) if name in self._round_trip else stored

    def forget(self) -> None:
        """Let go of the parameter that was read last."""
        self._last = None

    def _mean(self, entry: Entry) -> torch.Tensor:
        if entry.name not in self._means:
            total = torch.zeros(entry.shape[1:], dtype=torch.float64)
            for block in blocks(entry.rows, entry.bytes // entry.rows, _BLOCK_BYTES // 8):
                total += read_rows(entry, *block).to(torch.float64).sum(0)
            self._means[entry.name] = (total / entry.rows).to(entry.dtype)
        return self._means[entry.name]


def blocks(rows: int, row_bytes: int, budget: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` rows of `row_bytes` each into ranges of at most `budget` bytes (never less than one row)."""
    step = max(1, budget // max(1, row_bytes))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
