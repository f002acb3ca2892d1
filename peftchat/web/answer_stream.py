"""An answer as it comes: generated in a thread, passed on in steps that a page can show, and stopped on request."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.conversation import Message
from peftchat.serving.generate import ChatAnswer, generate_answer
from peftchat.serving.reasoning import split_reasoning
from peftchat.serving.sampling import Sampling, apply_sampling

if TYPE_CHECKING:
    from peftchat.web.loaded_models import LoadedModels

_SECONDS_BETWEEN_STEPS = 0.1
"""A page is redrawn no more often than this."""

_UNFINISHED = {
    "length": "the answer reached the token limit",
    "turn": "the model started another turn and was stopped",
    "interrupted": "stopped",
}


@dataclass(frozen=True, slots=True)
class AnswerStep:
    """The answer so far.

    Attributes:
        reasoning: its reasoning; None without one.
        content: the text behind that.
        answer: the finished answer; None while it is being generated.
        opened: whether the prompt opened a reasoning.
    """

    reasoning: str | None
    content: str
    answer: ChatAnswer | None = None
    opened: bool = False

    def note(self, *, with_speed: bool = True) -> str:
        """Return what there is to say about a finished answer, as one line."""
        answer = self.answer
        if answer is None:
            return ""
        parts = [f"{answer.tokens:,} tokens"]
        if with_speed and answer.seconds:
            parts.append(f"{answer.tokens / answer.seconds:.1f} tokens per second")
        if answer.finish in _UNFINISHED:
            parts.append(_UNFINISHED[answer.finish])
        if answer.dropped:
            rounds = "1 round no longer fits" if answer.dropped == 1 else f"{answer.dropped} rounds no longer fit"
            parts.append(f"the first {rounds} into the context")
        if answer.special_token_text:
            parts.append("text that is spelled like a special token was read as text")
        return " · ".join(parts)


def stream_answer(
    models: "LoadedModels",
    name: str,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    tools: str | None = None,
    stop: threading.Event,
) -> Iterator[AnswerStep]:
    """Yield the answer of a model as it grows; the last step holds the finished answer.

    A caller that goes away, such as a closed page, ends the generation too.

    Args:
        models: all models; the named one is used by this thread alone.
        name: the model.
        messages: the conversation, the user's message last.
        sampling: the user's settings.
        tools: definitions of tools, JSON text of a list.
        stop: ends the answer when it is set.

    Raises:
        UserError: the model's template refuses the conversation, or its last message is too long.
    """
    arrived: queue.SimpleQueue[str | ChatAnswer | BaseException] = queue.SimpleQueue()
    opened = models.models[name].chat.prompts.opens_reasoning
    gone = threading.Event()

    def is_stopped() -> bool:
        return stop.is_set() or gone.is_set()

    def generate() -> None:
        try:
            with models.using(name) as chat:
                if sampling.seed is not None:
                    from transformers import set_seed

                    set_seed(sampling.seed)
                settings = apply_sampling(chat.generation_config, sampling)
                answer = generate_answer(chat, messages, settings, arrived.put, tools=tools, stopped=is_stopped)
            arrived.put(answer)
        except BaseException as error:
            # It is raised again where the page can show it.
            arrived.put(error)

    thread = threading.Thread(target=generate, name="answer", daemon=True)
    thread.start()
    text = ""
    try:
        while True:
            pieces = _next(arrived)
            text += "".join(piece for piece in pieces if isinstance(piece, str))
            last = pieces[-1]
            if isinstance(last, BaseException):
                raise last
            if isinstance(last, ChatAnswer):
                yield AnswerStep(*split_reasoning(last.text, opened=opened), last, opened)
                return
            yield AnswerStep(*split_reasoning(text, opened=opened), None, opened)
    finally:
        # The caller's own signal stays as it is: another model's answer may follow.
        gone.set()
        thread.join()


def _next(
    arrived: "queue.SimpleQueue[str | ChatAnswer | BaseException]",
) -> "list[str | ChatAnswer | BaseException]":
    """Wait for something, and return what comes within one step of the page."""
    pieces = [arrived.get()]
    deadline = threading.Event()
    while isinstance(pieces[-1], str):
        if len(pieces) == 1:
            deadline.wait(_SECONDS_BETWEEN_STEPS)
        try:
            pieces.append(arrived.get_nowait())
        except queue.Empty:
            break
    return pieces
