"""The proof of a conversion: the adapter and its LoRA compared on the run's own conversations."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.merging.adapter_source import install_adapter, read_adapter_config
from peftchat.merging.empty_model import EmptyModel
from peftchat.merging.merge_job import MergeJob
from peftchat.merging.streaming import keep_positions, unmerged_model
from peftchat.merging.verify import compare_logits, load_prompt_tokenizer, verification_prompts

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

Data = Literal["held-out conversations", "training conversations", "built-in prompts"]

_MAX_CONVERSATIONS = 32
_MAX_LENGTH = 512
"""Tokens of a conversation that are read; answers further on are not compared."""
_LOGIT_BYTES = 256 << 20
"""Memory for one set of logits; two are compared at a time."""


@dataclass(frozen=True)
class ProofData:
    """Conversations as one padded batch.

    Attributes:
        source: where they come from.
        ids: int64, shape (conversations, T).
        mask: where there is a token, bool, same shape.
        targets: the token to predict at each position, int64, same shape; -100 where none is compared.
    """

    source: Data
    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor

    @property
    def compared(self) -> torch.Tensor:
        """The positions whose logits are compared, bool, shape (conversations, T)."""
        return self.targets >= 0


@dataclass(frozen=True)
class Comparison:
    """A LoRA compared with the adapter that it was made from, at the supervised tokens.

    Attributes:
        rank: of the LoRA.
        loss_before, loss_after: of the adapter and of the LoRA, in nats per token.
        kl: mean Kullback-Leibler divergence, adapter to LoRA, in nats per token.
        top1_agreement: fraction of tokens where both have the same most likely token.
        max_difference: largest difference of two logits, as a fraction of their range.
        update_error: norm of what the rank leaves out, as a fraction of the norm of the update.
    """

    rank: int
    loss_before: float
    loss_after: float
    kl: float
    top1_agreement: float
    max_difference: float
    update_error: float

    def within(self, tolerance: float) -> bool:
        """Return whether the divergence and the rise of the loss are at most `tolerance`, in nats per token."""
        return self.kl <= tolerance and self.loss_after - self.loss_before <= tolerance


class Proof:
    """Compares LoRAs with one adapter, whose logits are computed once.

    Args:
        job: base and adapter.
        base_name: where the base is now.
    """

    def __init__(self, job: MergeJob, base_name: str) -> None:
        self._job = job
        vocabulary = job.weights.empty_model.model.get_input_embeddings().weight.shape[0]
        self.data = _proof_data(job, base_name, vocabulary)
        self._labels = self.data.targets[self.data.compared]
        main, *added = [job.base.install(adapter) for adapter in job.adapters]
        self._expected = self._logits(unmerged_model(main, job.weights, added))
        self._loss = self._nll(self._expected)

    @property
    def tokens(self) -> int:
        """The number of compared tokens."""
        return len(self._labels)

    def compare(self, folder: Path, rank: int, update_error: float) -> Comparison:
        """Compare the LoRA in a folder, installed by stock PEFT from its files."""
        installed = install_adapter(self._job.base.empty_model(), read_adapter_config(folder), folder)
        found = self._logits(unmerged_model(installed, self._job.weights))
        measured = compare_logits(self._expected, found)
        return Comparison(
            rank=rank,
            loss_before=self._loss,
            loss_after=self._nll(found),
            kl=measured.kl,
            top1_agreement=measured.top1_agreement,
            max_difference=measured.max_difference,
            update_error=update_error,
        )

    def _logits(self, model: EmptyModel) -> torch.Tensor:
        keep_positions(model, self.data.compared)
        with torch.inference_mode():
            result = model.model(input_ids=self.data.ids, attention_mask=self.data.mask.long(), use_cache=False)
        logits: torch.Tensor = result.logits[0].float()
        return logits

    def _nll(self, logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits, self._labels))


def _proof_data(job: MergeJob, base_name: str, vocabulary: int) -> ProofData:
    budget = max(64, _LOGIT_BYTES // (4 * vocabulary))
    if job.source.recipe is not None:
        recipe = job.source.recipe.recipe
        place = {"name": base_name, "revision": job.source.base.revision}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=place)})
        try:
            found = list(_bounded(_examples(recipe), budget))
        except UserError as error:
            stderr.print(
                f"Note: the run's own conversations cannot be read, so built-in prompts are compared: {error}",
                markup=False,
                highlight=False,
            )
            found = []
        if found:
            source: Data = "held-out conversations" if recipe.data.has_eval else "training conversations"
            return _batch(source, found)
    tokenizer = load_prompt_tokenizer(job.source.folder) or load_prompt_tokenizer(job.base.folder)
    without_data = replace(job.source, recipe=None)
    prompts = verification_prompts(without_data, tokenizer, (), vocabulary)
    return _batch("built-in prompts", [(np.array(ids), np.array([-100, *ids[1:]])) for ids in prompts])


_Example = tuple[np.ndarray, np.ndarray]
"""Ids, and the label of each: the id itself where it is supervised, else -100."""


def _examples(recipe: "Recipe") -> Iterator[_Example]:
    """Yield the run's held-out conversations as it encoded them; those it trained on if it held out none."""
    from peftchat.chat_template.loss_mask import loss_mask_table
    from peftchat.conversations import ProblemLog
    from peftchat.dataset.cache import conversations
    from peftchat.dataset.encode import EncodingStats, encode_conversations
    from peftchat.training.context import load_chat_format

    split: Literal["train", "eval"] = "eval" if recipe.data.has_eval else "train"
    stream = itertools.islice(conversations(recipe, split, ProblemLog(strict=True)), 4 * _MAX_CONVERSATIONS)
    supervised = loss_mask_table(recipe.chat.loss_policy)
    for batch in encode_conversations(recipe, load_chat_format(recipe).encoder(), stream, EncodingStats()):
        for example in batch:
            ids = example.ids.astype(np.int64)
            yield ids, np.where(supervised[example.token_tags], ids, -100)


def _bounded(examples: Iterator[_Example], budget: int) -> Iterator[_Example]:
    """Yield as many examples as there is memory for, each with a target and cut to `_MAX_LENGTH`."""
    chosen = 0
    for ids, labels in examples:
        ids, labels = ids[:_MAX_LENGTH], labels[:_MAX_LENGTH].copy()
        targets = np.flatnonzero(labels[1:] >= 0) + 1
        labels[targets[budget:]] = -100
        budget -= len(targets)
        if len(targets):
            yield ids, labels
            chosen += 1
        if budget <= 0 or chosen == _MAX_CONVERSATIONS:
            return


def _batch(source: Data, examples: Sequence[_Example]) -> ProofData:
    shape = (len(examples), max(len(ids) for ids, _ in examples))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    targets = torch.full(shape, -100, dtype=torch.long)
    for row, (tokens, labels) in enumerate(examples):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, : len(tokens)] = True
        targets[row, : len(tokens) - 1] = torch.from_numpy(labels[1:])
    return ProofData(source, ids, mask, targets)
