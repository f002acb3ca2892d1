"""Verification: the merged model's logits compared with those of base + adapter."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.adapter_source import AdapterSource
from peftchat.merging.base_weights import BaseWeights
from peftchat.merging.empty_model import EmptyModel, build_empty_model
from peftchat.merging.merge_job import MergeJob, MergeOptions
from peftchat.merging.output import Verification, read_model_config
from peftchat.merging.streaming import (
    MergedReference,
    StoredWeights,
    keep_positions,
    stream_weights,
    trained_token_ids,
    unmerged_model,
)
from peftchat.models.safetensors_files import SafetensorsCheckpoint
from peftchat.recipe import Recipe

_POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class LogitDifferences:
    """Differences of two sets of logits; see `output.Verification` for each figure."""

    max_difference: float
    mean_difference: float
    logit_range: float
    kl: float
    top1_agreement: float


def compare_logits(expected: torch.Tensor, found: torch.Tensor) -> LogitDifferences:
    """Compare logits `[positions, vocabulary]`, a few positions at a time; a NaN in either makes the figures NaN."""
    logit_range = float(expected.max() - expected.min())
    largest = total = divergence = 0.0
    same_top1 = 0
    for start in range(0, len(expected), _POSITIONS_AT_ONCE):
        left, right = expected[start : start + _POSITIONS_AT_ONCE], found[start : start + _POSITIONS_AT_ONCE]
        difference = (left - right).abs()
        largest = max(largest, float(difference.max())) if not difference.isnan().any() else float("nan")
        total += float(difference.sum(dtype=torch.float64))
        log_left, log_right = left.double().log_softmax(-1), right.double().log_softmax(-1)
        divergence += float((log_left.exp() * (log_left - log_right)).sum())
        same_top1 += int((left.argmax(-1) == right.argmax(-1)).sum())
    count = len(expected)
    return LogitDifferences(
        max_difference=largest / logit_range,
        mean_difference=total / expected.numel() / logit_range,
        logit_range=logit_range,
        kl=max(0.0, divergence / count),
        top1_agreement=same_top1 / count,
    )


MAX_PROMPTS = 20
MAX_PROMPT_TOKENS = 64
"""Long enough that attention matters in every layer, short enough that twenty prompts fit into one batch."""

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


def verification_prompts(
    source: AdapterSource, tokenizer: Any, special: Sequence[int], vocabulary: int
) -> list[list[int]]:
    """Return prompts as ids: the run's held-out conversations, built-in prompts, and every trained token.

    Args:
        source: the run whose data is used.
        tokenizer: the merged model's; without one (None), ids are chosen from all of the vocabulary.
        special: ids of trained tokens; each occurs in at least one prompt, after an ordinary token.
        vocabulary: number of rows of the embedding.
    """
    if tokenizer is None:
        found = [[(97 * start + 31 * position) % vocabulary for position in range(32)] for start in range(8)]
    else:
        found = [_encode(tokenizer, messages) for messages in islice(_messages(source), MAX_PROMPTS)]
    found = [[token_id for token_id in ids if token_id < vocabulary][:MAX_PROMPT_TOKENS] for ids in found]
    found = [ids for ids in found if len(ids) > 1]
    seen = {token_id for ids in found for token_id in ids}
    ordinary = next((token_id for token_id in found[0] if token_id not in special), 0) if found else 0
    unseen = [token_id for token_id in special if token_id not in seen]
    for start in range(0, len(unseen), MAX_PROMPT_TOKENS // 2):
        part = unseen[start : start + MAX_PROMPT_TOKENS // 2]
        found.append([token for token_id in part for token in (ordinary, token_id)])
    return found


def load_prompt_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in a model folder; None if it has none."""
    from transformers import AutoTokenizer

    if not ((folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()):
        return None
    return AutoTokenizer.from_pretrained(str(folder))


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])


def _messages(source: AdapterSource) -> Iterator[list[dict[str, str]]]:
    if source.recipe is not None:
        with suppress(UserError):  # the data may have been moved; built-in prompts remain
            yield from _held_out_messages(source.recipe.recipe)
    for text in _BUILT_IN:
        yield [{"role": "user", "content": text}]


def _held_out_messages(recipe: Recipe) -> Iterator[list[dict[str, str]]]:
    """Yield the run's held-out conversations, or its training conversations if it held out none."""
    from peftchat.conversations import fit_split, read_sources

    data, seed = recipe.data, recipe.training.seed
    conversations = read_sources(data.eval or data.train, seed, consecutive=data.consecutive)
    if data.eval is None and data.eval_fraction is not None:
        split = fit_split(read_sources(data.train, seed, consecutive=data.consecutive), data.eval_fraction, seed)
        conversations = filter(split.is_eval, conversations)
    for conversation in conversations:
        yield [message for message in conversation.as_dicts() if message["role"] in ("user", "assistant")]


TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-4, 1e-6),
    torch.float32: (1e-4, 1e-6),
    torch.float16: (1e-2, 1e-4),
    torch.bfloat16: (5e-2, 5e-3),
}
"""Stored dtype -> limits for the largest logit difference, as a fraction of the range of the logits, and for the mean
KL divergence in nats. Rounding every merged weight once to the dtype stays within them; `docs/merge.md` has the
measurements."""

_LOGIT_BYTES = 96 << 20
_MIN_POSITIONS = 64


@dataclass(frozen=True)
class _Batch:
    """Prompts `[prompts, length]`, padded on the right; `mask` is true where there is a token."""

    ids: torch.Tensor
    mask: torch.Tensor


def verify_merged(job: MergeJob, folder: Path, options: MergeOptions) -> Verification:
    """Compare the merged model in `folder` with base + adapter.

    Args:
        job: the merge.
        folder: the written model.
        options: the dtype determines the tolerances, the memory budget the number of positions.
    """
    started = monotonic()
    vocabulary = job.weights.empty_model.model.get_input_embeddings().weight.shape[0]
    installed = [job.base.install(adapter) for adapter in job.adapters]
    special = trained_token_ids(installed)
    positions = min(_LOGIT_BYTES, options.memory_budget or _LOGIT_BYTES) // (4 * vocabulary)
    prompts = verification_prompts(job.source, load_prompt_tokenizer(folder), special, vocabulary)
    batch = _batch(prompts, max(_MIN_POSITIONS, positions))
    added_tokens = [found for found, adapter in zip(installed, job.adapters, strict=True) if adapter.is_added_tokens]
    is_stock = job.is_as_trained
    if is_stock:
        expected = _logits(unmerged_model(installed[0], job.weights, added_tokens), batch)
    else:
        reference = job.base.empty_model()
        stream_weights(reference, MergedReference(job.weights, job.plan))
        expected = _logits(reference, batch)
    merged = stored_model(folder, trust_remote_code=job.base.trust_remote_code)
    measured = compare_logits(expected, _logits(merged, batch))
    dtype = options.dtype or job.base.config.dtype or torch.float32
    tolerance_max, tolerance_kl = TOLERANCES[dtype]
    passed = measured.max_difference <= tolerance_max and measured.kl <= tolerance_kl
    present = set(batch.ids[batch.mask].tolist())
    return Verification(
        passed=passed,
        verdict=_verdict(measured, passed, dtype),
        reference="transformers with PEFT's layers, not merged" if is_stock else "the base with all deltas in float32",
        prompts=len(batch.ids),
        positions=len(expected),
        special_tokens=[token_id for token_id in special if token_id in present],
        max_difference=measured.max_difference,
        mean_difference=measured.mean_difference,
        logit_range=measured.logit_range,
        kl=measured.kl,
        top1_agreement=measured.top1_agreement,
        tolerance_max=tolerance_max,
        tolerance_kl=tolerance_kl,
        seconds=monotonic() - started,
    )


def stored_model(folder: Path, *, trust_remote_code: bool) -> EmptyModel:
    """Return a merged model as its own files describe it; its weights stream in."""
    empty_model = build_empty_model(read_model_config(folder), trust_remote_code=trust_remote_code)
    stream_weights(empty_model, StoredWeights(BaseWeights(SafetensorsCheckpoint.open(folder), empty_model), {}, {}))
    return empty_model


def _batch(prompts: Sequence[list[int]], positions: int) -> _Batch:
    """Pad prompts to one matrix; long ones lose their middle, so that all have about `positions` tokens together."""
    longest = max(2, positions // len(prompts))
    head, tail = longest - longest // 2, longest // 2
    prompts = [ids if len(ids) <= longest else ids[:head] + ids[-tail:] for ids in prompts]
    length = max(len(ids) for ids in prompts)
    batch = _Batch(
        torch.zeros(len(prompts), length, dtype=torch.long), torch.zeros(len(prompts), length, dtype=torch.bool)
    )
    for row, prompt in enumerate(prompts):
        batch.ids[row, : len(prompt)] = torch.tensor(prompt)
        batch.mask[row, : len(prompt)] = True
    return batch


def _logits(empty_model: EmptyModel, batch: _Batch) -> torch.Tensor:
    """Return the logits of all positions but padding, float32 `[positions, vocabulary]`."""
    keep_positions(empty_model, batch.mask)
    with torch.inference_mode():
        result: Any = empty_model.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    logits: torch.Tensor = result.logits[0].float()
    return logits


def _verdict(measured: LogitDifferences, passed: bool, dtype: torch.dtype) -> str:
    tolerance_max, tolerance_kl = TOLERANCES[dtype]
    name = str(dtype).removeprefix("torch.")
    figures = (
        f"largest logit difference {measured.max_difference:.2e} of the range "
        f"(allowed for {name}: {tolerance_max:.0e}), "
        f"mean KL {measured.kl:.2e} (allowed: {tolerance_kl:.0e}), same next token at {measured.top1_agreement:.1%}"
    )
    if passed:
        return f"The merged model computes what base and adapter compute: {figures}."
    return f"The merged model does not compute what base and adapter compute: {figures}."
