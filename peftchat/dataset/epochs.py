"""Packs of each epoch of a mixture: always the same number, so that the steps are known before training."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.dataset.mixture import Mixture
from peftchat.dataset.packing import Packs, keep_fullest, pack, split_largest

if TYPE_CHECKING:
    from peftchat.dataset.cache import EncodedSplit
    from peftchat.recipe import Recipe

_EPOCHS_AHEAD = 16
_EXAMPLES_AHEAD = 2_000_000
"""The number of packs is that of the epoch that needs most of them, among as many as this many examples are in."""


class EpochPacks:
    """The packs of every epoch, or its single examples where nothing is packed.

    The number does not depend on how long a run goes on, so that a resumed run has the same steps. An epoch that needs
    fewer packs has some of them split. One that needs more, which only a late one can, leaves the emptiest out.

    Attributes:
        mixture: draws the examples of each epoch.
        left_out: how many examples the last epoch that was asked for leaves out.
    """

    def __init__(self, mixture: Mixture, lengths: npt.NDArray[np.int64], capacity: int | None) -> None:
        """Find the number of packs.

        Args:
            mixture: see the attribute.
            lengths: tokens of every example of the store, int64, shape (N,).
            capacity: tokens that fit into one pack; None without packing.
        """
        self.mixture = mixture
        self.left_out = 0
        self._lengths, self._capacity = lengths, capacity
        self._last: tuple[int, Packs] | None = None
        self._number = mixture.per_epoch
        if capacity is not None:
            ahead = max(1, min(_EPOCHS_AHEAD, _EXAMPLES_AHEAD // max(1, mixture.per_epoch)))
            ahead = ahead if mixture.changes else 1
            self._number = max(len(self._packs(epoch)) for epoch in range(ahead))

    @classmethod
    def of(cls, recipe: "Recipe", split: "EncodedSplit") -> "EpochPacks | None":
        """Return the packs of the training split's epochs; None if the recipe draws its examples once."""
        mixture = Mixture.of(recipe, split.stats)
        if mixture is None:
            return None
        return cls(mixture, np.asarray(split.store.lengths), recipe.data.max_length if recipe.data.packing else None)

    def __len__(self) -> int:
        return self._number

    def of_epoch(self, epoch: int) -> Packs:
        """Return the packs of an epoch, by the numbers of their examples in the store."""
        if self._last is None or self._last[0] != epoch:
            packs = split_largest(self._packs(epoch), self._number)
            kept = keep_fullest(packs, self._number, self._lengths)
            self.left_out = len(packs.examples) - len(kept.examples)
            self._last = epoch, kept
        return self._last[1]

    def lengths_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the tokens of each pack of an epoch, int64, shape (packs,)."""
        packs = self.of_epoch(epoch)
        sums: npt.NDArray[np.int64] = np.add.reduceat(self._lengths[packs.examples], packs.offsets[:-1])
        return sums

    def _packs(self, epoch: int) -> Packs:
        drawn = self.mixture.draw(epoch)
        if self._capacity is None:
            return Packs(drawn, np.arange(len(drawn) + 1, dtype=np.int64))
        packs = pack(self._lengths[drawn], self._capacity, (self.mixture.seed, epoch))
        return Packs(drawn[packs.examples], packs.offsets)
