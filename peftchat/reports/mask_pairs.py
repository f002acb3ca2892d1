"""Two examples side by side: what both begin with, and each from where they part."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from peftchat.reports.mask import ShownExample, ShownToken

Tokens = list[tuple[ShownToken, bool]]
"""Tokens in order, and whether each was removed by truncation."""


@dataclass(frozen=True, slots=True)
class ShownPair:
    """The two answers of a pair.

    Attributes:
        names: what the two are called.
        examples: the two of them.
        shared: tokens that both begin with.
    """

    names: tuple[str, str]
    examples: tuple[ShownExample, ShownExample]
    shared: int

    @classmethod
    def of(cls, names: tuple[str, str], one: ShownExample, other: ShownExample) -> "ShownPair":
        """Find where two examples part."""
        both = zip(one.all_tokens, other.all_tokens, strict=False)
        same = takewhile(lambda pair: pair[0][0].ids == pair[1][0].ids and pair[0][1] == pair[1][1], both)
        return cls(names, (one, other), sum(1 for _ in same))

    @property
    def source(self) -> str:
        """The place of the record."""
        return self.examples[0].source

    @property
    def prompt(self) -> Tokens:
        """What both begin with."""
        return list(self.examples[0].all_tokens)[: self.shared]

    @property
    def sides(self) -> Iterator[tuple[str, ShownExample, Tokens]]:
        """Each name with its example, and the tokens from where the two part."""
        for name, example in zip(self.names, self.examples, strict=True):
            yield name, example, list(example.all_tokens)[self.shared :]


def pairs_of(names: tuple[str, str], examples: Iterable[ShownExample]) -> Iterator[ShownPair]:
    """Yield the pairs of examples that come as one, other, one, …"""
    stream = iter(examples)
    for one in stream:
        yield ShownPair.of(names, one, next(stream))
