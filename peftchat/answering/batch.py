"""A batch of answers: prompts of several lengths, padded on the left, each with random numbers of its own.

What a model answers does not depend on what else is in the batch, up to the rounding of its dtype: in float32 the
tokens are those of stock `generate` for one prompt at a time.
"""

import copy
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process

from peftchat.answering.prompting import Prompting
from peftchat.errors import UserError
from peftchat.models.decoding import tokenizer_argument
from peftchat.models.padded_prompts import pad_left
from peftchat.serving.chat_model import ChatModel
from peftchat.serving.generate import Finish, decode_answer, finish_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_STOP_WINDOW = 24
"""Tokens at the end of an answer that are searched for stop text after each step; the text has fewer."""

_WARPERS = (
    ("temperature", "TemperatureLogitsWarper", "temperature", lambda value: value != 1.0),
    ("top_h", "TopHLogitsWarper", "top_h", lambda value: True),
    ("top_k", "TopKLogitsWarper", "top_k", lambda value: value > 0),
    ("top_p", "TopPLogitsWarper", "top_p", lambda value: value < 1.0),
    ("min_p", "MinPLogitsWarper", "min_p", lambda value: True),
    ("typical_p", "TypicalLogitsWarper", "mass", lambda value: value < 1.0),
    ("epsilon_cutoff", "EpsilonLogitsWarper", "epsilon", lambda value: 0.0 < value < 1.0),
    ("eta_cutoff", "EtaLogitsWarper", "epsilon", lambda value: 0.0 < value < 1.0),
)
"""Setting, transformers' class for it, that class's name of it, and whether a value has an effect; in its order.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/generation/utils.py (_get_logits_processor)
"""


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer of a batch.

    Attributes:
        ids: the generated ids, without the token that ended the answer.
        text: without special tokens, stop text and surrounding white space.
        finish: why it ended.
    """

    ids: list[int]
    text: str
    finish: Finish


def seed_of(seed: int, *parts: object) -> int:
    """Return the seed of one answer: 63 bits of a digest of the run's seed and of what names the answer."""
    text = "\0".join([str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def generate_batch(
    chat: ChatModel,
    prompting: Prompting,
    prompts: Sequence[Sequence[int]],
    settings: "GenerationConfig",
    max_new_tokens: int,
    seeds: Sequence[int],
) -> list[Generated]:
    """Generate one answer for each prompt; a batch that exceeds the device's memory is halved.

    Args:
        prompts: token ids of each.
        settings: from `apply_sampling`.
        max_new_tokens: most tokens of an answer.
        seeds: from `seed_of`, one for each prompt; greedy decoding does not use them.

    Raises:
        UserError: not even one prompt fits into the device's memory.
    """
    try:
        return _generate(chat, prompting, prompts, settings, max_new_tokens, seeds)
    except torch.OutOfMemoryError as error:
        half = len(prompts) // 2
        if not half:
            what = f"the device has no memory for a prompt of {len(prompts[0]):,} tokens and its answer"
            raise UserError(what, where=chat.name, hint="Lower --max-new-tokens.") from error
    torch.accelerator.memory.empty_cache()
    parts = (slice(None, half), slice(half, None))
    return [
        answer
        for part in parts
        for answer in generate_batch(chat, prompting, prompts[part], settings, max_new_tokens, seeds[part])
    ]


def _generate(
    chat: ChatModel,
    prompting: Prompting,
    prompts: Sequence[Sequence[int]],
    settings: "GenerationConfig",
    max_new_tokens: int,
    seeds: Sequence[int],
) -> list[Generated]:
    stops = prompting.end_ids | prompting.turn_ids
    pad = settings.pad_token_id if settings.pad_token_id is not None else min(stops, default=0)
    ids, mask = pad_left(prompts, pad, chat.device)
    width = ids.shape[1]
    stop_text = None
    criteria = StoppingCriteriaList()
    if prompting.stop_text is not None:
        stop_text = StopText(chat.tokenizer, prompting.stop_text, width, len(prompts))
        criteria.append(stop_text)
    with torch.inference_mode():
        output = chat.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_without_sampling(settings),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad,
            logits_processor=seeded_sampling(settings, seeds, chat.device),
            stopping_criteria=criteria,
            **tokenizer_argument(settings, chat.tokenizer),
        )
    rows = output[:, width:].tolist()
    lengths = [None] * len(rows) if stop_text is None else stop_text.lengths
    return [_cut(chat, prompting, row, length) for row, length in zip(rows, lengths, strict=True)]


def _cut(chat: ChatModel, prompting: Prompting, row: list[int], length: int | None) -> Generated:
    """Cut a row of the output at the token or the text that ended it."""
    stops = prompting.end_ids | prompting.turn_ids
    end = next((index for index, token in enumerate(row) if token in stops), len(row))
    if length is not None and length <= end and prompting.stop_text is not None:
        ids = row[:length]
        raw = str(chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        found = prompting.stop_text.search(raw)
        return Generated(ids, (raw[: found.start()] if found else raw).strip(), "turn")
    last = row[end] if end < len(row) else None
    return Generated(row[:end], decode_answer(chat.tokenizer, row[:end]), finish_of(last, prompting.end_ids, stops))


class StopText(StoppingCriteria):
    """Ends each row whose text holds a pattern.

    Args:
        tokenizer: decodes.
        pattern: shorter than 24 tokens.
        width: the length of the padded prompts.
        rows: the number of prompts.

    Attributes:
        lengths: for each row the number of generated tokens when it was ended; None while it was not.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", pattern: re.Pattern[str], width: int, rows: int) -> None:
        self.lengths: list[int | None] = [None] * rows
        self._tokenizer = tokenizer
        self._pattern = pattern
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Any, **arguments: Any) -> Tensor:
        """Return which rows have ended, shape (rows,)."""
        length = input_ids.shape[1]
        tails = input_ids[:, max(self._width, length - _STOP_WINDOW) :].tolist()
        for row, tail in enumerate(tails):
            if self.lengths[row] is None:
                text = self._tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                if self._pattern.search(str(text)):
                    self.lengths[row] = length - self._width
        done = [found is not None for found in self.lengths]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


class SeededChoice(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers, and leaves it as the only one.

    The largest of the log-probabilities plus Gumbel noise is a draw from the distribution (Gumbel, 1954), so the
    greedy choice that follows is a sample. The numbers are drawn on the CPU: devices agree.

    Args:
        seeds: one for each row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, shape (rows, vocabulary), with noise added."""
        size = scores.shape[-1]
        waits = torch.stack([torch.empty(size).exponential_(generator=each) for each in self._generators])
        return scores - waits.log().to(scores.device)


def seeded_sampling(
    settings: "GenerationConfig", seeds: Sequence[int], device: torch.device | str = "cpu"
) -> LogitsProcessorList:
    """Return the processors that sample as `settings` say, row by row; none where decoding is greedy."""
    processors = LogitsProcessorList()
    if not settings.do_sample:
        return processors
    for name, kind, argument, acts in _WARPERS:
        value = getattr(settings, name, None)
        if value is not None and acts(value):
            place = {"device": str(device)} if name == "eta_cutoff" else {}
            processors.append(getattr(logits_process, kind)(**{argument: value}, **place))
    processors.append(SeededChoice(seeds))
    return processors


def _without_sampling(settings: "GenerationConfig") -> "GenerationConfig":
    """Return a copy that is greedy: `seeded_sampling` has drawn already."""
    greedy = copy.deepcopy(settings)
    greedy.do_sample = False
    for name, *_ in _WARPERS:
        if hasattr(greedy, name):
            setattr(greedy, name, None)
    return greedy
