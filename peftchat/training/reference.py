"""Reference of a preference run: the base with its adapter switched off, and the log-probabilities it gave once."""

from collections.abc import Iterator, Mapping
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


@contextmanager
def reference_model(model: nn.Module, initial: EmbeddingSnapshot | None) -> Iterator[None]:
    """Make the model compute what it computed before training, without gradients and without dropout.

    The adapter is switched off, and the embeddings of added tokens, which PEFT does not know, are those of the start.

    Args:
        model: the model that is trained, which no process may have sharded.
        initial: the added tokens' embeddings before training; None without added tokens.
    """
    was_training = model.training
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapter_off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    model.eval()
    try:
        with torch.no_grad(), adapter_off, _initial_embeddings(model, initial):
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
