"""How the next token is chosen: the model's own settings, and what the user says instead."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.serving.chat_model import ChatModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


DEFAULT_NEW_TOKENS = 1024
"""Longest answer where neither the model nor the user sets a limit."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The user's choices; None leaves each to the model's `generation_config.json`.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling (Holtzman et al., 2020).
        top_k: sample among so many tokens.
        greedy: always the likeliest token.
        seed: makes sampling repeatable.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse choices that contradict each other."""
        chosen = {"--temperature": self.temperature, "--top-p": self.top_p, "--top-k": self.top_k}
        first = next((flag for flag, value in chosen.items() if value), None)
        if self.greedy and first is not None:
            raise UserError(
                f"{first} says how to sample, and --greedy does not sample", where=first, hint="Leave one of them out."
            )


def apply_sampling(settings: "GenerationConfig", sampling: Sampling) -> "GenerationConfig":
    """A copy of the model's settings with the user's choices in it; one answer at a time, token by token."""
    chosen = copy.deepcopy(settings)
    chosen.max_new_tokens = sampling.max_new_tokens or settings.max_new_tokens or DEFAULT_NEW_TOKENS
    chosen.max_length = None
    chosen.num_beams = 1
    chosen.num_return_sequences = 1
    if sampling.temperature or sampling.top_p is not None or sampling.top_k is not None:
        chosen.do_sample = True
    if sampling.greedy or sampling.temperature == 0:
        chosen.do_sample = False
    if not chosen.do_sample:
        chosen.temperature = chosen.top_p = chosen.top_k = None
        return chosen
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(sampling, name)
        if value is not None:
            setattr(chosen, name, value)
    return chosen


Finish = Literal["end", "turn", "length", "interrupted"]
"""Why an answer ended: the end token, a token that opens somebody else's turn, the limit, or the user."""

_HALF_CHARACTER = "�"


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What the model said.

    Attributes:
        text: without special tokens, white space around it removed.
        finish: why it ended.
        tokens: tokens written, the one that ended it not counted.
        prompt_tokens: tokens read.
        dropped: earlier exchanges that no longer fitted into the prompt.
        lookalikes: stretches of the prompt spelled like a special token and read as text.
        seconds: from prompt to end.
    """

    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    dropped: int
    lookalikes: int
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
) -> ChatAnswer:
    """Let the model answer a conversation.

    Args:
        messages: the conversation, the user's message last.
        settings: what `apply_sampling` made.
        on_text: gets each new stretch of the answer; joined, they are `ChatAnswer.text`.

    Raises:
        UserError: the last message does not fit into the model's context.
    """
    started = monotonic()
    room = min(settings.max_new_tokens, chat.context_length // 2)
    prompt = chat.prompts.fit(messages, chat.context_length - room)
    ends, turns = chat.stop_ids, chat.prompts.turn_ids
    writer = _Writer(chat.tokenizer, ends | turns, on_text)
    interrupted = False
    try:
        _generate(chat, prompt.ids, settings, room, writer)
    except KeyboardInterrupt:
        interrupted = True
    writer.end()
    last = writer.last
    finish: Finish = "length"
    if interrupted:
        finish = "interrupted"
    elif last in ends:
        finish = "end"
    elif last in turns:
        finish = "turn"
    return ChatAnswer(
        writer.text,
        finish,
        len(writer.ids),
        len(prompt.ids),
        prompt.dropped,
        prompt.lookalikes,
        monotonic() - started,
    )


def _generate(chat: ChatModel, ids: list[int], settings: "GenerationConfig", room: int, writer: "_Writer") -> None:
    inputs = torch.tensor([ids], device=chat.device)
    pad = settings.pad_token_id if settings.pad_token_id is not None else chat.prompts.end_id
    with torch.inference_mode():
        chat.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=settings,
            max_new_tokens=room,
            eos_token_id=sorted(writer.stops),
            pad_token_id=pad,
            streamer=writer,
        )


class _Writer:
    """transformers' streamer interface: takes ids as they come and hands on the text that they add.

    Its text is decoded from the whole answer each time, since what a token spells depends on those before it.
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
        """The prompt on the first call, then one token a call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.last = int(value.reshape(-1)[-1])
        if self.last in self.stops:
            return
        self.ids.append(self.last)
        text = self._decoded()
        # A character of several bytes may still be under way.
        if not text.endswith(_HALF_CHARACTER):
            self._hand_on(text)

    def end(self) -> None:
        """Hand on what was held back."""
        self._hand_on(self._decoded())

    def _decoded(self) -> str:
        arguments: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(self.ids, **arguments)).strip()

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self.text):
            self._on_text(text[len(self.text) :])
            self.text = text
