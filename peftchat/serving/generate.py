"""Generate an answer: the streamed text and why it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from peftchat.conversation import Message
from peftchat.models.decoding import tokenizer_argument
from peftchat.serving.chat_model import ChatModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


Finish = Literal["end", "turn", "length", "interrupted"]
"""Why an answer ended: the end token, a token that opens another turn, the token limit, or the user."""

_INCOMPLETE_CHARACTER = "�"


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """The model's answer.

    Attributes:
        text: the answer without special tokens and surrounding white space.
        finish: why it ended.
        tokens: generated tokens, without the one that ended the answer.
        prompt_tokens: tokens of the prompt.
        dropped: earlier rounds that did not fit into the prompt.
        special_token_text: texts in the prompt that are spelled like a special token and were encoded as text.
        seconds: time from prompt to end.
    """

    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    dropped: int
    special_token_text: int
    seconds: float

    @property
    def stopped(self) -> bool:
        """Whether the model ended its turn itself."""
        return self.finish == "end"


def generate_answer(
    chat: ChatModel,
    messages: Sequence[Message],
    settings: "GenerationConfig",
    on_text: Callable[[str], None] = lambda text: None,
    *,
    tools: str | None = None,
    stopped: Callable[[], bool] | None = None,
) -> ChatAnswer:
    """Generate the answer to a conversation.

    Args:
        messages: the conversation, the user's message last.
        settings: from `sampling.apply_sampling`.
        on_text: receives each new part of the answer; joined, the parts are `ChatAnswer.text`.
        tools: definitions of tools, JSON text of a list.
        stopped: asked after each token whether the user wants no more of it. Ctrl-C stops an answer in any case.

    Raises:
        UserError: the last message does not fit into the model's context.
    """
    started = monotonic()
    max_new_tokens = min(settings.max_new_tokens, chat.context_length // 2)
    prompt = chat.prompts.truncate_to_fit(messages, chat.context_length - max_new_tokens, tools)
    ends, turns = chat.stop_ids, chat.prompts.turn_ids
    streamer = _TextStreamer(chat.tokenizer, ends | turns, on_text)
    interrupted = False
    try:
        _generate(chat, prompt.ids, settings, max_new_tokens, streamer, stopped)
    except KeyboardInterrupt:
        interrupted = True
    streamer.end()
    if stopped is not None and stopped():
        interrupted = streamer.last not in ends | turns
    finish = "interrupted" if interrupted else finish_of(streamer.last, ends, turns)
    if finish == "length" and len(streamer.ids) < max_new_tokens:
        finish = "end"  # A setting of the model's own ended it, such as `stop_strings`.
    return ChatAnswer(
        streamer.text,
        finish,
        len(streamer.ids),
        len(prompt.ids),
        prompt.dropped,
        prompt.special_token_text,
        monotonic() - started,
    )


def finish_of(last: int | None, ends: frozenset[int], turns: frozenset[int]) -> Finish:
    """Return why an answer ended, by its last token."""
    if last in ends:
        return "end"
    return "turn" if last in turns else "length"


def decode_answer(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Return the text of an answer without special tokens and surrounding white space."""
    arguments: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **arguments)).strip()


def _generate(
    chat: ChatModel,
    ids: list[int],
    settings: "GenerationConfig",
    max_new_tokens: int,
    streamer: "_TextStreamer",
    stopped: Callable[[], bool] | None,
) -> None:
    inputs = torch.tensor([ids], device=chat.device)
    pad = settings.pad_token_id if settings.pad_token_id is not None else chat.prompts.end_id
    with torch.inference_mode():
        chat.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=settings,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(streamer.stops),
            pad_token_id=pad,
            streamer=streamer,
            stopping_criteria=None if stopped is None else [_Stopped(stopped)],
            **tokenizer_argument(settings, chat.tokenizer),
        )


class _Stopped:
    """Stopping criterion for transformers: the user wants no more of the answer."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **arguments: Any) -> Tensor:
        """Return for each row whether to stop: bool, shape (N,)."""
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)


class _TextStreamer:
    """Streamer for transformers: passes on the text of each new token.

    All ids are decoded each time, since the text of a token depends on those before it.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", stops: frozenset[int], on_text: Callable[[str], None]
    ) -> None:
        self.stops = stops
        self.ids: list[int] = []
        self.last: int | None = None
        self.text = ""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Receive the prompt on the first call, then one token per call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.last = int(value.reshape(-1)[-1])
        if self.last in self.stops:
            return
        self.ids.append(self.last)
        text = self._decoded()
        # A character of several bytes may still be incomplete.
        if not text.endswith(_INCOMPLETE_CHARACTER):
            self._pass_on(text)

    def end(self) -> None:
        """Pass on the text of an incomplete character at the end."""
        self._pass_on(self._decoded())

    def _decoded(self) -> str:
        return decode_answer(self._tokenizer, self.ids)

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.text):
            self._on_text(text[len(self.text) :])
            self.text = text
