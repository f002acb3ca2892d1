"""Reference of a preference run: the model before the first step, and the log-probabilities it gave once.

That is the base with the adapter switched off, or the run that the recipe begins at.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import Tensor, nn

from peftchat.models.added_tokens import EmbeddingSnapshot, find_added_tokens

if TYPE_CHECKING:
    from peftchat.runs.fingerprints import Digests

FILE_NAME = "reference.npz"
"""The log-probabilities in a checkpoint: those of a resumed run are then the same numbers, not computed again."""

LogProbs = npt.NDArray[np.float32]


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every trained parameter, by name."""
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


@contextmanager
def reference_model(
    model: nn.Module, initial: EmbeddingSnapshot | None, start: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Make the model compute what it computed before training, without gradients and without dropout.

    The adapter is switched off, and the embeddings of added tokens, which PEFT does not know, are those of the start.
    An adapter that goes on from a run has the values of that run instead.

    Args:
        model: the model that is trained, which no process may have sharded.
        initial: the added tokens' embeddings before training; None without added tokens.
        start: the trained parameters before training, of a run that began at another one.
    """
    was_training = model.training
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapter_off = model.disable_adapter() if isinstance(model, PeftModel) and start is None else nullcontext()
    as_at_start = _initial_embeddings(model, initial) if start is None else _values(_pairs(model, start))
    model.eval()
    try:
        with torch.no_grad(), adapter_off, as_at_start:
            yield
    finally:
        model.train(was_training)
        for parameter, requires_grad in trained:
            # PEFT switches the frozen adapters of PiSSA and its relatives on as trained ones.
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextmanager
def _initial_embeddings(model: nn.Module, initial: EmbeddingSnapshot | None) -> Iterator[None]:
    added = find_added_tokens(model)
    if added is None or initial is None:
        yield
        return
    held = [(added.input_embeddings, initial.input)]
    if added.output_embeddings is not None and initial.output is not None:
        held.append((added.output_embeddings, initial.output))
    with _values(held):
        yield


def _pairs(model: nn.Module, values: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    return [(parameter, values[name]) for name, parameter in model.named_parameters() if name in values]


@contextmanager
def _values(held: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Give parameters other values for a while."""
    trained = [parameter.data for parameter, _ in held]
    try:
        for parameter, values in held:
            parameter.data = values.to(parameter)
        yield
    finally:
        for (parameter, _), values in zip(held, trained, strict=True):
            parameter.data = values


class ReferenceLogProbs:
    """The reference's log-probability of each answer, computed once.

    A later epoch and a later evaluation find the numbers of the first one, so the reference costs one pass over each
    pair, whatever the number of epochs.

    Args:
        digests: of the examples of each split; a file's numbers are taken over for the same examples alone.
    """

    def __init__(self, digests: "Mapping[str, Digests]") -> None:
        self._digests = digests
        self._known: dict[str, LogProbs] = {
            split: np.full(len(found), np.nan, dtype=np.float32) for split, found in digests.items()
        }

    def lacks(self, split: str, examples: npt.NDArray[np.int64] | None = None) -> bool:
        """Return whether the log-probability of one of some examples is not known; by default, of one of all."""
        known = self._known[split]
        return bool(np.isnan(known if examples is None else known[examples]).any())

    def add(self, split: str, examples: npt.NDArray[np.int64], log_probs: Tensor) -> None:
        """Take note of the log-probabilities of some examples, float32, shape (examples,)."""
        self._known[split][examples] = log_probs.float().cpu().numpy()

    def of(self, split: str, examples: npt.NDArray[np.int64]) -> Tensor:
        """Return the known log-probabilities of some examples, float32, shape (examples,), on the CPU."""
        return torch.from_numpy(self._known[split][examples])

    def merge(self, gathered: "list[dict[str, LogProbs]]") -> None:
        """Take over what other processes know.

        Args:
            gathered: `known` of each process.
        """
        for split, own in self._known.items():
            for other in gathered:
                np.copyto(own, other[split], where=np.isnan(own))

    def save(self, folder: Path) -> None:
        """Write what is known into a checkpoint."""
        arrays: dict[str, Any] = {}
        for split, digests in self._digests.items():
            arrays |= {split: self._known[split], f"{split}_digests": digests}
        np.savez(folder / FILE_NAME, **arrays)

    @property
    def known(self) -> dict[str, LogProbs]:
        """The log-probabilities of each split; not a number where they were not needed yet."""
        return self._known

    def load(self, folder: Path) -> None:
        """Take over what a checkpoint holds of the same examples; nothing where it has no such file."""
        path = folder / FILE_NAME
        if not path.is_file():
            return
        with np.load(path, allow_pickle=False) as found:
            for split, digests in self._digests.items():
                if split not in found or not np.array_equal(found[f"{split}_digests"], digests):
                    continue
                self._known[split] = found[split].astype(np.float32)
