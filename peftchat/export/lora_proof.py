"""The proof of a LoRA: compared with the adapter, or the adapters, that it stands for, on the runs' conversations."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.merging.adapter_source import AdapterSource, install_adapter, read_adapter_config
from peftchat.merging.empty_model import EmptyModel
from peftchat.merging.merge_job import MergeJob
from peftchat.merging.streaming import MergedReference, keep_positions, stream_weights, unmerged_model
from peftchat.merging.verify import compare_logits, load_prompt_tokenizer, stored_model, verification_prompts

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

Data = Literal["held-out conversations", "training conversations", "built-in prompts"]

_MAX_CONVERSATIONS = 32
_MAX_LENGTH = 512
"""Tokens of a conversation that are read; answers further on are not compared."""
_LOGIT_BYTES = 256 << 20
"""Memory for one set of logits; two are compared at a time."""


@dataclass(frozen=True)
class DataPart:
    """Conversations of one run, or of several runs with the same ones.

    Attributes:
        runs: names of the runs' folders; none for built-in prompts.
        source: where the conversations come from.
        conversations, tokens: their number, and that of the compared tokens.
    """

    runs: tuple[str, ...]
    source: Data
    conversations: int
    tokens: int


@dataclass(frozen=True)
class ProofData:
    """Conversations as one padded batch.

    Attributes:
        parts: where they come from, in their order.
        ids: int64, shape (conversations, T).
        mask: where there is a token, bool, same shape.
        targets: the token to predict at each position, int64, same shape; -100 where none is compared.
    """

    parts: tuple[DataPart, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor

    @property
    def source(self) -> Data:
        """Where the first conversations come from."""
        return self.parts[0].source

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
    """Compares LoRAs with what they stand for, whose logits are computed once.

    Args:
        job: base and adapters: a single one as trained, or several that are combined.
        base_name: where the base is now.
        sources: the runs whose conversations are compared; None for the first run of the job.
    """

    def __init__(self, job: MergeJob, base_name: str, sources: Sequence[AdapterSource] | None = None) -> None:
        self._job = job
        vocabulary = job.weights.empty_model.model.get_input_embeddings().weight.shape[0]
        self.data = _proof_data(job, base_name, vocabulary, sources or (job.source,))
        self._labels = self.data.targets[self.data.compared]
        self._expected = self._logits(self._subject())
        self._loss = self._nll(self._expected)

    @property
    def tokens(self) -> int:
        """The number of compared tokens."""
        return len(self._labels)

    @property
    def losses(self) -> list[float]:
        """What the LoRAs are compared with: its loss on each part of the data, in nats per token."""
        return self._by_part(self._expected)

    def compare(self, folder: Path, rank: int, update_error: float) -> Comparison:
        """Compare the LoRA in a folder, installed by stock PEFT from its files."""
        found = self._logits(self._lora(folder))
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

    def losses_of_lora(self, folder: Path) -> list[float]:
        """Return the loss of the LoRA in a folder on each part of the data, in nats per token."""
        return self._by_part(self._logits(self._lora(folder)))

    def losses_of_model(self, folder: Path) -> list[float]:
        """Return the loss of a merged model on each part of the data, in nats per token."""
        return self._by_part(self._logits(stored_model(folder, trust_remote_code=self._job.base.trust_remote_code)))

    def losses_of_adapters(self) -> list[list[float]]:
        """Return the loss of each adapter alone, as trained, on each part of the data, in nats per token."""
        found = []
        for main, added in self._job.groups():
            installed = [self._job.base.install(adapter) for adapter in (main, *added)]
            found.append(self._by_part(self._logits(unmerged_model(installed[0], self._job.weights, installed[1:]))))
        return found

    def _subject(self) -> EmptyModel:
        """Return what the LoRAs are compared with: PEFT's own layers, or the base with all updates in float32."""
        if self._job.is_as_trained:
            main, *added = [self._job.base.install(adapter) for adapter in self._job.adapters]
            return unmerged_model(main, self._job.weights, added)
        model = self._job.base.empty_model()
        stream_weights(model, MergedReference(self._job.weights, self._job.plan))
        return model

    def _lora(self, folder: Path) -> EmptyModel:
        installed = install_adapter(self._job.base.empty_model(), read_adapter_config(folder), folder)
        return unmerged_model(installed, self._job.weights)

    def _logits(self, model: EmptyModel) -> torch.Tensor:
        keep_positions(model, self.data.compared)
        with torch.inference_mode():
            result = model.model(input_ids=self.data.ids, attention_mask=self.data.mask.long(), use_cache=False)
        logits: torch.Tensor = result.logits[0].float()
        return logits

    def _nll(self, logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits, self._labels))

    def _by_part(self, logits: torch.Tensor) -> list[float]:
        sizes = [part.tokens for part in self.data.parts]
        pairs = zip(logits.split(sizes), self._labels.split(sizes), strict=True)
        return [float(torch.nn.functional.cross_entropy(part, labels)) for part, labels in pairs]


def _proof_data(job: MergeJob, base_name: str, vocabulary: int, sources: Sequence[AdapterSource]) -> ProofData:
    budget = max(64, _LOGIT_BYTES // (4 * vocabulary * len(sources)))
    found: list[tuple[DataPart, list[_Example]]] = []
    for source in sources:
        examples = _of_run(source, base_name, budget)
        if not examples:
            continue
        assert source.recipe is not None
        kind: Data = "held-out conversations" if source.recipe.recipe.data.has_eval else "training conversations"
        same = next((index for index, (_, other) in enumerate(found) if _equal(other, examples)), None)
        if same is None:
            found.append((_part((source.model.name,), kind, examples), examples))
        else:
            part, other = found[same]
            found[same] = replace(part, runs=(*part.runs, source.model.name)), other
    if not found:
        tokenizer = load_prompt_tokenizer(job.source.folder) or load_prompt_tokenizer(job.base.folder)
        prompts = verification_prompts(replace(job.source, recipe=None), tokenizer, (), vocabulary)
        examples = [(np.array(ids), np.array([-100, *ids[1:]])) for ids in prompts]
        found.append((_part((), "built-in prompts", examples), examples))
    return _batch(tuple(part for part, _ in found), [example for _, examples in found for example in examples])


def _of_run(source: AdapterSource, base_name: str, budget: int) -> "list[_Example]":
    """Return a run's own conversations; none of an adapter without a recipe, and none if they cannot be read."""
    if source.recipe is None:
        return []
    recipe = source.recipe.recipe
    place = {"name": base_name, "revision": source.base.revision}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=place)})
    try:
        return list(_bounded(_examples(recipe), budget))
    except UserError as error:
        stderr.print(
            f"Note: the conversations of {source.model.name} cannot be read, so others are compared: {error}",
            markup=False,
            highlight=False,
        )
        return []


def _part(runs: tuple[str, ...], source: Data, examples: "Sequence[_Example]") -> DataPart:
    tokens = sum(int((labels[1:] >= 0).sum()) for _, labels in examples)
    return DataPart(runs, source, len(examples), tokens)


def _equal(one: "Sequence[_Example]", other: "Sequence[_Example]") -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


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


def _batch(parts: tuple[DataPart, ...], examples: Sequence[_Example]) -> ProofData:
    shape = (len(examples), max(len(ids) for ids, _ in examples))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    targets = torch.full(shape, -100, dtype=torch.long)
    for row, (tokens, labels) in enumerate(examples):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, : len(tokens)] = True
        targets[row, : len(tokens) - 1] = torch.from_numpy(labels[1:])
    return ProofData(parts, ids, mask, targets)
