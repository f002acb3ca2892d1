"""Our loaded model as the harness's model: answers kept as they come, counted, and a batch that fits.

Imports EleutherAI's harness; import this module inside functions only.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
from lm_eval.models.huggingface import HFLM

from peftchat.errors import UserError, VerificationError
from peftchat.evaluating.kept_answers import KeptAnswers, Key, request_key

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_MOST_ON_GPU = 64
_MOST_ON_CPU = 8
"""A larger batch is not faster on a CPU, whose cores one sequence keeps busy."""

_BYTES_PER_LOGIT = 16
"""Logits in the model's dtype, their log-softmax and the temporary float32 copies of both."""

_SHARE_OF_MEMORY = 0.25


class _Hook:
    """The harness's cache hook, by which it passes on each answer as soon as it is there."""

    def __init__(self, add: Callable[[str, Any, Any], None]) -> None:
        self.add_partial = add


class HarnessModel(HFLM):
    """A loaded model for the harness.

    The harness's own `peft` argument would not load the embeddings of added tokens, so it gets the model itself.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: sequences of a batch; "auto" for the largest that fits.
        answers: where answers are kept.
        on_answer: called after each answer, with the number of answers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: str, answers: KeptAnswers, on_answer: Callable[[int], None]
    ) -> None:
        on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
        most = _MOST_ON_CPU if on_cpu else _MOST_ON_GPU
        with _loaded_as_it_is(model):
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_batch_size=most,
                max_length=_context(model, tokenizer),
            )
        self._answers = answers
        self._on_answer = on_answer
        self._on_cpu = on_cpu
        self.cut = 0
        """Requests whose beginning did not fit into the model's context."""
        self._cut: set[Key] = set()
        self._longest_prompt: int | None = None
        self.set_cache_hook(_Hook(self._keep))

    def loglikelihood(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        found = self._answered("loglikelihood", requests, super().loglikelihood)
        return [(float(likelihood), bool(greedy)) for likelihood, greedy in found]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text."""
        return self._answered("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model generates for each request."""
        return self._answered("generate_until", requests, super().generate_until)

    def _answered(self, kind: str, requests: "Sequence[Instance]", ask: Callable[..., list[Any]]) -> list[Any]:
        """Ask what is not kept yet, and return all answers in order."""
        keys = [request_key(kind, request.args) for request in requests]
        missing = [
            place for place, (key, request) in enumerate(zip(keys, requests, strict=True))
            if key not in self._answers or _is_random(request)
        ]  # fmt: skip
        self._on_answer(len(requests) - len(missing))
        new = ask([requests[place] for place in missing], disable_tqdm=True) if missing else []
        answers = dict(zip(missing, new, strict=True))
        self.cut += sum(self._answers.is_cut(key) for key in keys)
        return [answers[place] if place in answers else self._answers[key] for place, key in enumerate(keys)]

    def _keep(self, kind: str, arguments: Any, answer: Any) -> None:
        likelihood = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(likelihood, float) and math.isnan(likelihood):
            raise VerificationError("the model computes probabilities that are not numbers (NaN)")
        key = request_key(kind, arguments)
        if kind == "generate_until":
            cut = self._longest_prompt is not None and len(self.tok_encode(arguments[0])) > self._longest_prompt
        else:
            cut = key in self._cut
        self._answers.add(key, answer, cut=cut)
        self._on_answer(1)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"an answer of a question has {len(continuation)} tokens, and the model's context only "
                    f"{self.max_length}",
                    hint="Leave the task out, or evaluate a model with a longer context.",
                )
            if texts is not None and len(context) + len(continuation) > self.max_length + 1:
                self._cut.add(request_key("loglikelihood", texts))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: int | None = None, **kwargs: Any) -> Any:
        """Return ids and attention masks of prompts; too long ones lose their beginning."""
        self._longest_prompt = left_truncate_len
        return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Return the largest batch: on a GPU by trial, on a CPU by the memory of its logits."""
        if not self._on_cpu:
            return int(super()._detect_batch_size(requests, pos))
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len((context + continuation)[-(self.max_length + 1) :][:-1]))
        row = length * self.config.get_text_config().vocab_size * _BYTES_PER_LOGIT
        fits = int(psutil.virtual_memory().available * _SHARE_OF_MEMORY / max(1, row))
        return max(1, min(self.max_batch_size, fits))


@contextmanager
def _loaded_as_it_is(model: Any) -> Iterator[None]:
    """Keep the harness from tying weights again, which are tied: PEFT's wrapper of added tokens has no such weight.

    lm_eval 0.4.13, `HFLM.__init__`.
    """
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


def _context(model: Any, tokenizer: Any) -> int | None:
    """Return the tokens that fit beside the virtual tokens of a prompt adapter; None without such an adapter."""
    from lm_eval.models.utils import resolve_max_length

    adapters = getattr(model, "peft_config", None) or {}
    virtual = sum(getattr(config, "num_virtual_tokens", None) or 0 for config in adapters.values())
    if not virtual:
        return None
    return int(resolve_max_length(model.config, tokenizer, default=HFLM._DEFAULT_MAX_LENGTH)) - virtual


def _is_random(request: "Instance") -> bool:
    """Whether the answer is sampled, so that a kept one would be given to every repetition."""
    settings = request.args[1] if len(request.args) > 1 else None
    return isinstance(settings, dict) and bool(settings.get("do_sample"))
