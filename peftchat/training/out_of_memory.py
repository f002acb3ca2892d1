"""Out of memory: recognizing it, saying where it happened, and redoing a step in smaller micro-batches."""

import errno
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftchat.errors import VerificationError, first_line
from peftchat.training.position import Position, RunPosition

if TYPE_CHECKING:
    from peftchat.dataset.collator import Batch, ChatCollator

_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "OutOfMemory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
    "std::bad_alloc",
)
"""What torch, CUDA, safetensors and the C++ library say; on a CPU torch raises a plain `RuntimeError`."""


class OutOfMemory(VerificationError):
    """A run needed more memory than there is.

    Attributes:
        position: what it was doing.
    """

    def __init__(self, message: str, position: Position) -> None:
        super().__init__(message)
        self.position = position


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, says that memory is used up."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(found, OSError) and found.errno == errno.ENOMEM:
            return True
        if isinstance(found, Exception) and any(words in str(found) for words in _WORDS):
            return True
        found = found.__cause__
    return False


@contextmanager
def telling_out_of_memory(position: RunPosition, sources: Callable[[Position], str]) -> Iterator[None]:
    """Raise `OutOfMemory` with what the run was doing, in place of a library's error.

    Args:
        position: of this process.
        sources: names the conversations of a position.

    Raises:
        OutOfMemory: memory is used up.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, VerificationError) or not is_out_of_memory(error):
            raise
        now = position.now
        named = f", with {sources(now)}" if len(now.examples) else ""
        raise OutOfMemory(f"out of memory in {now}{named} ({first_line(error)})", now) from error


class Halving:
    """Trains micro-batches, and redoes a step in smaller ones where memory runs out.

    The loss of a step is a sum over its targets, divided by their number in the whole step. So its gradient does not
    depend on how the step is cut: the conversations of a micro-batch are dealt out to several in their order. A pack is
    cut too, because its conversations do not see each other.

    Args:
        collator: lays out conversations.
        train: computes the gradient of a batch as one of so many equal parts of a micro-batch, adds it up, and returns
            the loss and that of each target.
        forget: drops the gradient of the step so far.
        tell: called with a sentence when the micro-batch is halved.
        longest: tokens of a pack.

    Attributes:
        parts: the parts that each micro-batch is cut into from now on.
    """

    def __init__(
        self,
        collator: "ChatCollator",
        train: Callable[["Batch", int], tuple[Tensor, Tensor]],
        forget: Callable[[], None],
        tell: Callable[[str], None],
        longest: int,
    ) -> None:
        self.parts = 1
        self._collator = collator
        self._train = train
        self._forget = forget
        self._tell = tell
        self._longest = longest
        self._before: list[Sequence[int]] = []

    def begin_step(self) -> None:
        """Begin an optimizer step."""
        self._before = []

    def run(self, batch: "Batch", examples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Train a micro-batch.

        Args:
            batch: as it was laid out.
            examples: its conversations.

        Returns:
            Its loss, shape (), and that of each of its targets, shape (targets,).

        Raises:
            Exception: memory is used up by conversations that cannot be dealt out any further.
        """
        redo: Sequence[Sequence[int]] = ()
        while True:
            try:
                for earlier in redo:
                    self._in_parts(earlier)
                result = self._train(batch, 1) if self.parts == 1 else self._in_parts(examples)
                self._before.append(examples)
                return result
            except Exception as error:
                most = max(len(one) for one in (*self._before, examples))
                if not is_out_of_memory(error) or self.parts >= most:
                    raise
                problem = first_line(error)
            # Behind the `except`: the error holds the frames, and they hold the tensors.
            self.parts *= 2
            self._tell(
                f"Out of memory ({problem}). The step is done again with each micro-batch in {self.parts} parts; the "
                "update is the same. Later steps are cut like this too."
            )
            self._forget()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            redo = self._before

    def _in_parts(self, examples: Sequence[int]) -> tuple[Tensor, Tensor]:
        parts = deal_out(examples, [self._collator.examples.lengths[index] for index in examples], self.parts)
        results = []
        for part in parts:
            batch: dict[str, Any] = self._collator(self._rows(part))
            for name in ("examples", "target_counts"):
                del batch[name]
            results.append(self._train(batch, len(parts)))
        losses, each = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.cat(each)

    def _rows(self, examples: Sequence[int]) -> list[dict[str, list[int]]]:
        """Return the rows of a batch: the collator concatenates them, or each has a row of its own."""
        if self._collator.layout != "packed":
            return [{"examples": [index]} for index in examples]
        # Rows of more tokens than before would need more memory than they save.
        lengths = np.array([self._collator.examples.lengths[index] for index in examples])
        longest = max(self._longest, int(lengths.max()))
        rows: list[list[int]] = [[]]
        space = longest
        for index, length in zip(examples, lengths.tolist(), strict=True):
            if length > space:
                rows.append([])
                space = longest
            rows[-1].append(index)
            space -= length
        return [{"examples": row} for row in rows]


def deal_out(examples: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the examples in at most so many parts of about equally many tokens, in their order, none empty.

    Args:
        examples: what is dealt out.
        lengths: the tokens of each.
        parts: how many parts there may be.
    """
    middles = np.cumsum(lengths) - np.asarray(lengths) / 2
    places = np.minimum(parts * middles / max(1, sum(lengths)), parts - 1).astype(int)
    found = [[int(one) for one, place in zip(examples, places, strict=True) if place == part] for part in range(parts)]
    return [part for part in found if part]
