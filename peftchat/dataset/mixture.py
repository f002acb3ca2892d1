"""Mixture: the examples of each epoch, where the shares of the sources are drawn again (`data.resample`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.dataset.labels import label_notes
from peftchat.formatting import format_count

if TYPE_CHECKING:
    from peftchat.dataset.cache import Split
    from peftchat.dataset.encode import EncodingStats
    from peftchat.recipe import Recipe

Indices = npt.NDArray[np.int32]
"""Numbers of examples in their store, shape (N,)."""


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What an epoch takes of one source.

    Attributes:
        path: the source, as the recipe names it.
        weight: its weight.
        examples: its examples.
        whole: how often each of them is used in every epoch.
        drawn: how many of them are drawn in each epoch besides, each once.
    """

    path: str
    weight: float
    examples: int
    whole: int
    drawn: int

    @classmethod
    def of(cls, path: str, weight: float, examples: int) -> "SourceShare":
        """Return the share by a weight; a source with examples and a part of a weight has one drawn at least."""
        whole, part = divmod(weight, 1)
        drawn = min(examples, max(1, round(part * examples))) if part else 0
        return cls(path, weight, examples, int(whole), drawn)

    @property
    def per_epoch(self) -> int:
        """Examples of one epoch, repeated ones included."""
        return self.whole * self.examples + self.drawn

    def __str__(self) -> str:
        if not self.drawn:
            times = {1: "", 2: " twice"}.get(self.whole, f" {self.whole} times")
            return f"all {format_count(self.examples)} of {self.path}{times}"
        drawn = f"{format_count(self.drawn)} of {format_count(self.examples)} of {self.path}"
        more = {0: "", 1: " besides all of them"}.get(self.whole, f" besides all of them {self.whole} times")
        return f"{drawn}{more} (weight {self.weight:g})"


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sources of a recipe with `data.resample`, and the draw of each epoch.

    Attributes:
        sources: the share of each, in the order of their examples.
        seed: the recipe's.
    """

    sources: tuple[SourceShare, ...]
    seed: int
    _turns: "dict[int, _Turns]" = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, recipe: "Recipe", stats: "EncodingStats") -> "Mixture | None":
        """Return the mixture of the training examples; None if the recipe draws them once.

        Args:
            recipe: its sources, their weights and its seed.
            stats: the counts of the training split, encoded with every conversation once.
        """
        if not recipe.data.resample:
            return None
        shares = zip(recipe.data.train, stats.by_source, strict=True)
        return cls(
            tuple(SourceShare.of(entry.path, entry.weight, number) for entry, number in shares), recipe.training.seed
        )

    @property
    def per_epoch(self) -> int:
        """Examples of one epoch, the same number in each."""
        return sum(source.per_epoch for source in self.sources)

    @property
    def changes(self) -> bool:
        """Whether two epochs can differ."""
        return any(source.drawn % source.examples for source in self.sources if source.examples)

    def draw(self, epoch: int) -> Indices:
        """Return the examples of an epoch, those of one source after those of another."""
        parts = [np.zeros(0, np.int32)]
        start = 0
        for place, source in enumerate(self.sources):
            everything = np.arange(start, start + source.examples, dtype=np.int32)
            parts += [everything] * source.whole
            if source.drawn:
                turns = self._turns.setdefault(place, _Turns(source.examples, source.drawn, (self.seed, place)))
                parts.append(everything[turns.of(epoch)])
            start += source.examples
        return np.concatenate(parts)

    def __str__(self) -> str:
        shares = "; ".join(map(str, self.sources))
        text = f"drawn again in each epoch: {format_count(self.per_epoch)} examples ({shares})"
        return text if self.changes else f"{text}. So few examples make every epoch the same"


def examples_per_epoch(recipe: "Recipe", stats: "EncodingStats") -> int:
    """Return the number of training examples of an epoch, repeated ones included."""
    mixture = Mixture.of(recipe, stats)
    return stats.examples if mixture is None else mixture.per_epoch


def data_notes(recipe: "Recipe", split: "Split", stats: "EncodingStats") -> Iterator[str]:
    """Yield what is to be said about the data of a split: of reading (`EncodingStats`), and of the draw."""
    yield from stats.reading_notes()
    if split == "train":
        yield from label_notes(recipe, stats.labels)
    mixture = Mixture.of(recipe, stats) if split == "train" else None
    if mixture is None:
        return
    yield str(mixture)
    if recipe.training.max_steps <= 0 and recipe.training.num_train_epochs <= 1:
        yield "the run has one epoch, so that nothing is drawn a second time"


class _Turns:
    """Draws `drawn` of `size` numbers in each epoch, so that each has its turn before any has its next.

    The epochs follow one another through permutations of all numbers. A permutation that an epoch enters from the one
    before has the numbers at its end that this epoch has already, so that no epoch has a number twice.
    """

    def __init__(self, size: int, drawn: int, seed: tuple[int, ...]) -> None:
        self._size, self._drawn, self._seed = size, drawn, seed
        self._number, self._order = 0, self._permutation(0)

    def of(self, epoch: int) -> Indices:
        """Return the numbers of an epoch in ascending order, int32, shape (drawn,)."""
        number, start = divmod(epoch * self._drawn, self._size)
        self._go_to(number)
        found = self._order[start : start + self._drawn]
        missing = self._drawn - len(found)
        if missing:
            self._go_to(number + 1)
            found = np.concatenate([found, self._order[:missing]])
        return np.sort(found)

    def _go_to(self, number: int) -> None:
        if number < self._number:
            self._number, self._order = 0, self._permutation(0)
        while self._number < number:
            self._number += 1
            # An epoch begins at each multiple of `drawn`, and this many numbers before the permutation's own start.
            before = self._number * self._size % self._drawn
            following = self._permutation(self._number)
            taken = np.isin(following, self._order[self._size - before :])
            self._order = np.concatenate([following[~taken], following[taken]])

    def _permutation(self, number: int) -> Indices:
        generator = np.random.default_rng([*self._seed, number])
        return generator.permutation(np.arange(self._size, dtype=np.int32))
