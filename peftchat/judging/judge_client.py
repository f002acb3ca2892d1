"""The judge that is asked: an OpenAI-compatible endpoint, or a model on this machine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from peftchat.errors import UserError, VerificationError, first_line

if TYPE_CHECKING:
    from openai import OpenAI

    from peftchat.serving.chat_model import ChatModel

KEY_VARIABLE = "OPENAI_API_KEY"
_SECONDS = 120.0
_RETRIES = 6


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge wrote, and what it cost.

    Attributes:
        text: the reply.
        prompt_tokens: tokens of the request; 0 if the endpoint does not say.
        tokens: tokens of the reply; 0 if the endpoint does not say.
        finish: why it ended, in the endpoint's words.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: str


class JudgeUnreachable(VerificationError):
    """The judge gave no reply after all retries."""


class Judge(Protocol):
    """Something that replies to messages."""

    name: str
    concurrency: int

    def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """Return the reply.

        Raises:
            JudgeUnreachable: there is none.
        """


class EndpointJudge:
    """A judge behind an OpenAI-compatible endpoint (a hosted model, vLLM, Ollama, llama.cpp's server).

    The client waits as long as a limit of rates says, and tries again with growing pauses where it says nothing.

    Args:
        url: the base URL, such as `http://127.0.0.1:8000/v1`.
        model: its name there; None for the only one that the endpoint lists.
        temperature: of the replies.
        max_tokens: most tokens of a reply.
        concurrency: requests at a time.
        key_variable: the environment variable with the key; local servers need none.
        seconds: limit of one request.
        retries: tries after the first one.

    Raises:
        UserError: the endpoint does not answer, lists several models, or wants a key.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        concurrency: int = 4,
        key_variable: str = KEY_VARIABLE,
        seconds: float = _SECONDS,
        retries: int = _RETRIES,
    ) -> None:
        self.concurrency = concurrency
        self._temperature, self._max_tokens = temperature, max_tokens
        self._client = _client(url, key_variable, seconds, retries)
        self._model = self._reach(url, model, key_variable)
        self.name = f"{url.rstrip('/')}#{self._model}"

    def _reach(self, url: str, model: str | None, key_variable: str) -> str:
        """Return the name of the model, after the endpoint has answered; listing its models costs nothing."""
        import openai

        where = f"--judge {url}"
        try:
            names = [found.id for found in self._client.with_options(max_retries=1, timeout=10).models.list()]
        except openai.AuthenticationError as error:
            hint = f"Set {key_variable} to its key."
            raise UserError("the endpoint wants a key, or another one", where=where, hint=hint) from error
        except openai.OpenAIError as error:
            # Some endpoints and some keys list no models, but answer.
            if model is not None and isinstance(error, openai.APIStatusError):
                return model
            what = f"the endpoint does not answer: {first_line(error)}"
            raise UserError(what, where=where, hint="Check the address; it ends in /v1.") from error
        if model is not None:
            return model
        if len(names) != 1:
            what = f"the endpoint has {len(names)} models" + (f": {', '.join(names[:5])}" if names else "")
            raise UserError(what, where=where, hint=f"Name one: `--judge {url}#MODEL`.")
        return names[0]

    def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """Return the reply (see `Judge.ask`)."""
        import openai

        try:
            done = self._client.chat.completions.create(
                model=self._model,
                messages=list(messages),  # type: ignore[arg-type]
                temperature=self._temperature,
                max_tokens=self._max_tokens,
            )
        except openai.OpenAIError as error:
            raise JudgeUnreachable(f"{self.name}: {first_line(error)}") from error
        except ValueError as error:
            raise JudgeUnreachable(f"{self.name}: the reply is no JSON: {first_line(error)}") from error
        if not getattr(done, "choices", None):
            raise JudgeUnreachable(f"{self.name}: the reply has no choices")
        choice, usage = done.choices[0], done.usage
        text = choice.message.content or ""
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
        return Reply(text, *tokens, str(choice.finish_reason))


def _client(url: str, key_variable: str, seconds: float, retries: int) -> "OpenAI":
    if find_spec("openai") is None:
        hint = "Install it: `pip install 'peftchat[judge]'`."
        raise UserError("endpoints are asked by the package `openai`, which is not installed", hint=hint)
    from openai import OpenAI

    # The client refuses an empty key; local servers take any.
    key = os.environ.get(key_variable) or "none"
    return OpenAI(base_url=url, api_key=key, timeout=seconds, max_retries=retries)


class LocalJudge:
    """A chat model on this machine, greedy.

    Args:
        chat: the model, loaded.
        max_tokens: most tokens of a reply.
    """

    concurrency = 1

    def __init__(self, chat: "ChatModel", max_tokens: int = 1024) -> None:
        from peftchat.serving.sampling import Sampling, apply_sampling

        self.name = chat.name
        self._chat = chat
        self._settings = apply_sampling(chat.generation_config, Sampling(max_new_tokens=max_tokens, greedy=True))

    def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """Return the reply (see `Judge.ask`)."""
        from peftchat.conversation import Message
        from peftchat.serving.generate import generate_answer

        history = [Message("system" if one["role"] == "system" else "user", one["content"]) for one in messages]
        answer = generate_answer(self._chat, history, self._settings)
        return Reply(answer.text, answer.prompt_tokens, answer.tokens, answer.finish)
