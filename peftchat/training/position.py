"""Position of a process in its run: what it does, in which step, with which conversations.

The training loop notes it at every micro-batch, and an error that ends the run names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from peftchat.chat_template.examples import ExampleStore
    from peftchat.dataset.cache import Split

Part = Literal[
    "loading the model",
    "the checks before the first step",
    "measuring what is fastest here",
    "waiting for the next batch",
    "the forward pass",
    "the backward pass",
    "the optimizer's update",
    "the evaluation",
    "answering questions",
    "writing a checkpoint",
    "writing the model",
]

_OF_STEP = ("waiting for the next batch", "the forward pass", "the backward pass", "the optimizer's update")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a process is.

    Attributes:
        part: what it does.
        step: the optimizer step, from 1 on; 0 before the first.
        split: which conversations `examples` counts.
        examples: indices of those that are worked on.
    """

    part: Part = "loading the model"
    step: int = 0
    split: "Split" = "train"
    examples: Sequence[int] = ()

    def __str__(self) -> str:
        if self.part in _OF_STEP:
            return f"{self.part} of step {self.step}"
        return f"{self.part} after step {self.step}" if self.step else self.part

    def sources(self, store: "ExampleStore | None") -> list[str]:
        """Return the conversations as `file:line`, each once."""
        if store is None:
            return []
        return list(dict.fromkeys(store[int(index)].source for index in self.examples))


class RunPosition:
    """The present position of this process.

    Attributes:
        now: the position.
    """

    def __init__(self) -> None:
        self.now = Position()

    def enter(self, part: Part, step: int, examples: Sequence[int] = (), split: "Split" = "train") -> None:
        """Note a new position; see `Position`."""
        self.now = Position(part, step, split, examples)
