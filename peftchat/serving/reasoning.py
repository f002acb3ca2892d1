"""The reasoning at the start of an answer: told apart from the content while the text streams in."""

from collections.abc import Iterator
from dataclasses import dataclass

_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What opens and what closes a reasoning in the text of an answer."""


def opens_reasoning(prompt: str) -> bool:
    """Return whether a prompt ends with the mark that opens a reasoning."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in _MARKS))


def split_reasoning(answer: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Return the reasoning of an answer without its marks, None if it has none, and the content behind it.

    Args:
        answer: the whole text. A reasoning without an end is all of it.
        opened: whether the prompt opened a reasoning.
    """
    for opening, closing in _MARKS:
        if opened or answer.lstrip().startswith(opening):
            reasoning, mark, content = answer.lstrip().removeprefix(opening).partition(closing)
            if mark or not opened:
                return reasoning.strip(), content.strip()
    return (answer.strip(), "") if opened else (None, answer)


@dataclass(slots=True)
class ReasoningStream:
    """Tells for each piece of a streamed answer whether it is reasoning, which stands at the start only.

    Attributes:
        inside: whether the text that comes next is reasoning; at first, whether the prompt opened one.
    """

    inside: bool = False
    _held: str = ""
    _closings: tuple[str, ...] = tuple(closing for _, closing in _MARKS)
    _done: bool = False

    def feed(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the text in pieces, each with whether it is reasoning. What may be part of a mark is held back."""
        self._held += text
        if not (self.inside or self._done):
            start = self._held.lstrip()
            for opening, closing in _MARKS:
                if start.startswith(opening):
                    self.inside, self._closings = True, (closing,)
                    break
            else:
                if any(opening.startswith(start) for opening, _ in _MARKS):
                    return
                self._done = True
        if self.inside:
            ends = [at + len(mark) for mark in self._closings if (at := self._held.find(mark)) >= 0]
            keep = 0 if ends else max(_overlap(self._held, mark) for mark in self._closings)
            stop = min(ends) if ends else len(self._held) - keep
            if stop:
                yield self._held[:stop], True
            self._held = self._held[stop:]
            self.inside, self._done = not ends, bool(ends)
        if self._done and self._held:
            yield self._held, False
            self._held = ""

    def end(self) -> Iterator[tuple[str, bool]]:
        """Yield what was held back."""
        if self._held:
            yield self._held, self.inside
            self._held = ""


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text begin a mark."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
