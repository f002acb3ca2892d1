"""Figures for how far two sets of logits are apart."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.adapter_source import AdapterSource, install_adapter
from peftchat.merging.base_weights import BaseWeights
from peftchat.merging.empty_model import EmptyModel, build_empty_model
from peftchat.merging.output import Verification, read_model_config
from peftchat.merging.prepare import MergeJob, MergeOptions
from peftchat.merging.safetensors_io import SafetensorsCheckpoint
from peftchat.merging.streaming import (
    MergedReference,
    StoredWeights,
    keep_positions,
    stream_weights,
    trained_token_ids,
    unmerged_model,
)

_ROWS = 64


@dataclass(frozen=True)
class LogitDifferences:
    """See `report.Verification` for what each figure means."""

    max_difference: float
    mean_difference: float
    logit_range: float
    kl: float
    same_greedy: float


def compare_logits(expected: torch.Tensor, found: torch.Tensor) -> LogitDifferences:
    """Compare logits `[positions, vocabulary]`, a few positions at a time. A NaN on either side makes NaN figures."""
    spread = float(expected.max() - expected.min())
    largest = total = divergence = 0.0
    same = 0
    for start in range(0, len(expected), _ROWS):
        left, right = expected[start : start + _ROWS], found[start : start + _ROWS]
        apart = (left - right).abs()
        largest = max(largest, float(apart.max())) if not apart.isnan().any() else float("nan")
        total += float(apart.sum(dtype=torch.float64))
        log_left, log_right = left.double().log_softmax(-1), right.double().log_softmax(-1)
        divergence += float((log_left.exp() * (log_left - log_right)).sum())
        same += int((left.argmax(-1) == right.argmax(-1)).sum())
    count = len(expected)
    return LogitDifferences(
        max_difference=largest / spread,
        mean_difference=total / expected.numel() / spread,
        logit_range=spread,
        kl=max(0.0, divergence / count),
        same_greedy=same / count,
    )


MOST_PROMPTS = 20
MOST_TOKENS = 64
"""In a prompt: long enough for every layer's attention to matter, short enough that twenty fit one batch."""

_BUILT_IN = (
    "How do I read a file line by line in Python?",
    "Write a function that returns the n-th Fibonacci number.",
    "Explain the difference between a list and a tuple, with an example of each.",
    "What does HTTP status 404 mean, and how is it different from 500?",
    "Translate to French: the quick brown fox jumps over the lazy dog.",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "Why is the sky blue? Answer in one sentence.",
    "¿Cuál es la capital de Perú? 東京はどこですか。 Где находится Байкал?",
)


def prompts(run: AdapterSource, tokenizer: Any, special: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Prompts as ids: conversations of the run's held-out data, built-in ones after them, and every special token.

    Args:
        run: the run whose data is used.
        tokenizer: the merged model's; None if it has none, and then ids are spread over the vocabulary.
        special: ids with trained rows; each occurs in at least one prompt, between ordinary tokens.
        vocabulary: number of rows of the embedding.
    """
    if tokenizer is None:
        found = [[(97 * start + 31 * place) % vocabulary for place in range(32)] for start in range(8)]
    else:
        found = [_encode(tokenizer, messages) for messages in islice(_messages(run), MOST_PROMPTS)]
    found = [[index for index in ids if index < vocabulary][:MOST_TOKENS] for ids in found]
    found = [ids for ids in found if len(ids) > 1]
    seen = {index for ids in found for index in ids}
    ordinary = next((index for index in found[0] if index not in special), 0) if found else 0
    unseen = [index for index in special if index not in seen]
    for start in range(0, len(unseen), MOST_TOKENS // 2):
        found.append([token for index in unseen[start : start + MOST_TOKENS // 2] for token in (ordinary, index)])
    return found


def load_prompt_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder, None if it has none."""
    from transformers import AutoTokenizer

    if not ((folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()):
        return None
    return AutoTokenizer.from_pretrained(str(folder))


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])


def _messages(run: AdapterSource) -> Iterator[list[dict[str, str]]]:
    if run.recipe is not None:
        with suppress(UserError):  # the data may have moved since; the comparison does not depend on it
            yield from _of_run(run)
    for text in _BUILT_IN:
        yield [{"role": "user", "content": text}]


def _of_run(run: AdapterSource) -> Iterator[list[dict[str, str]]]:
    """The run's held-out conversations; those it trained on where it held out none."""
    from peftchat.conversations import fit_split, read_sources

    assert run.recipe is not None
    data, seed = run.recipe.recipe.data, run.recipe.recipe.training.seed
    conversations = read_sources(data.eval or data.train, seed)
    if data.eval is None and data.eval_fraction is not None:
        split = fit_split(read_sources(data.train, seed), data.eval_fraction, seed)
        conversations = filter(split.is_eval, conversations)
    for conversation in conversations:
        yield [message for message in conversation.as_dicts() if message["role"] in ("user", "assistant")]


TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-4, 1e-6),
    torch.float32: (1e-4, 1e-6),
    torch.float16: (1e-2, 1e-4),
    torch.bfloat16: (5e-2, 5e-3),
}
"""Stored type -> largest logit difference as a share of the logits' range, and mean KL divergence in nats: what may be
left after every merged weight was rounded once to the type. `docs/merge.md` has the measurements behind them."""

_LOGIT_BYTES = 96 << 20
_FEWEST_POSITIONS = 64


@dataclass(frozen=True)
class _Batch:
    """Prompts side by side, `[prompts, length]`, padded on the right; `real` is true where there is a token."""

    ids: torch.Tensor
    real: torch.Tensor


def verify_merged(job: MergeJob, folder: Path, options: MergeOptions) -> Verification:
    """Measure the merged model in `folder` against what it was made from.

    Args:
        job: the merge.
        folder: the written model.
        options: the type decides the tolerance, the working set how much is compared at once.
    """
    started = monotonic()
    vocabulary = job.weights.hollow.model.get_input_embeddings().weight.shape[0]
    adapters = [install_adapter(job.base.hollow(), member.config, member.folder) for member in job.members]
    special = trained_token_ids(adapters)
    room = min(_LOGIT_BYTES, options.working_set or _LOGIT_BYTES) // (4 * vocabulary)
    batch = _batch(prompts(job.run, load_prompt_tokenizer(folder), special, vocabulary), max(_FEWEST_POSITIONS, room))
    beside = [adapter for adapter, member in zip(adapters, job.members, strict=True) if member.is_rows]
    stock = len(job.members) - len(beside) == 1 and job.members[0].weight == 1.0
    if stock:
        expected = _logits(unmerged_model(adapters[0], job.weights, beside), batch)
    else:
        folded = job.base.hollow()
        stream_weights(folded, MergedReference(job.weights, job.plan))
        expected = _logits(folded, batch)
    measured = compare_logits(expected, _logits(_merged_model(job, folder), batch))
    dtype = options.dtype or job.base.config.dtype or torch.float32
    most, most_kl = TOLERANCES[dtype]
    passed = measured.max_difference <= most and measured.kl <= most_kl
    present = set(batch.ids[batch.real].tolist())
    return Verification(
        passed=passed,
        verdict=_verdict(measured, passed, most, most_kl, dtype),
        reference="transformers with PEFT's layers, not merged" if stock else "the base with all updates in float32",
        prompts=len(batch.ids),
        positions=len(expected),
        special_tokens=[index for index in special if index in present],
        max_difference=measured.max_difference,
        mean_difference=measured.mean_difference,
        logit_range=measured.logit_range,
        kl=measured.kl,
        same_greedy=measured.same_greedy,
        tolerance_max=most,
        tolerance_kl=most_kl,
        seconds=monotonic() - started,
    )


def _merged_model(job: MergeJob, folder: Path) -> EmptyModel:
    """The merged model as its own files describe it."""
    hollow = build_empty_model(read_model_config(folder), trust_remote_code=job.base.trust_remote_code)
    stream_weights(hollow, StoredWeights(BaseWeights(SafetensorsCheckpoint.open(folder), hollow), {}, {}))
    return hollow


def _batch(found: Sequence[list[int]], positions: int) -> _Batch:
    """Pad the prompts to one matrix, each cut in its middle so that together they have about `positions` tokens."""
    longest = max(2, positions // len(found))
    head, tail = longest - longest // 2, longest // 2
    found = [ids if len(ids) <= longest else ids[:head] + ids[-tail:] for ids in found]
    length = max(len(ids) for ids in found)
    ids = torch.zeros(len(found), length, dtype=torch.long)
    real = torch.zeros(len(found), length, dtype=torch.bool)
    for row, prompt in enumerate(found):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        real[row, : len(prompt)] = True
    return _Batch(ids, real)


def _logits(hollow: EmptyModel, batch: _Batch) -> torch.Tensor:
    """Logits of the real positions, float32 `[positions, vocabulary]`."""
    keep_positions(hollow, batch.real)
    with torch.inference_mode():
        result: Any = hollow.model(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False)
    logits: torch.Tensor = result.logits[0].float()
    return logits


def _verdict(measured: LogitDifferences, passed: bool, most: float, most_kl: float, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    figures = (
        f"largest logit difference {measured.max_difference:.2e} of the range (allowed for {kind}: {most:.0e}), "
        f"mean KL {measured.kl:.2e} (allowed: {most_kl:.0e}), same next token at {measured.same_greedy:.1%}"
    )
    if passed:
        return f"The merged model computes what base and adapter compute: {figures}."
    return f"The merged model does not compute what base and adapter compute: {figures}."
