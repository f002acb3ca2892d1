"""Position of a process in its run: what it does, in which step, with which conversations.

Errors and reports of hangs name it. The training thread notes it at every micro-batch; any thread may read it.
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
        count: how many positions it had before; processes that train together pass the same ones.
        part: what it does.
        step: the optimizer step, from 1 on; 0 before the first.
        split: which conversations `examples` counts.
        examples: indices of those that are worked on.
        is_steady: whether it takes about as long as it took before: not so in a first step, which may compile, and not
            in an evaluation or a checkpoint.
    """

    count: int = 0
    part: Part = "loading the model"
    step: int = 0
    split: "Split" = "train"
    examples: Sequence[int] = ()
    is_steady: bool = False

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
        now: the position. It is replaced as a whole, so that another thread never sees a part of it.
    """

    _STEADY_AFTER = 2
    """Steps of this process after which its steps take about equally long."""

    def __init__(self) -> None:
        self.now = Position()
        self._first_step: int | None = None

    def enter(self, part: Part, step: int, examples: Sequence[int] = (), split: "Split" = "train") -> None:
        """Note a new position; see `Position`."""
        of_step = part in _OF_STEP
        if of_step and self._first_step is None:
            self._first_step = step
        is_steady = of_step and step - (self._first_step or 0) >= self._STEADY_AFTER
        self.now = Position(self.now.count + 1, part, step, split, examples, is_steady)
