"""What encoding asks of a tokenizer, whichever library stands behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text that was given in parts.

    Attributes:
        ids: token ids.
        parts: for each token, the first and the last part whose characters it covers.
    """

    ids: list[int]
    parts: list[tuple[int, int]]


class Backend(Protocol):
    """A way to turn ordinary text into ids."""

    @property
    def whitespace(self) -> str | None:
        """The characters that a token with `rstrip` or `lstrip` takes with it; None for those of `str.strip`."""

    def encode(self, texts: Sequence[str], *, first: bool) -> list[list[int]]:
        """Ids of each text."""
        ...

    def encode_parts(self, texts: Sequence[Sequence[str]], *, first: bool) -> list[Tokens]:
        """Ids of each text, which comes in parts, and where each of its tokens lies."""
        ...

    def spells(self, ids: Sequence[int]) -> bool:
        """Whether these ids stand for one text only, so that a text whose ids begin with them begins with it."""
        ...
