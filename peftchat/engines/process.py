"""The engine's process: started, asked whether it answers, and ended with everything that it started."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peftchat.addresses import url_of
from peftchat.engines.commands import EngineCommand, Place
from peftchat.errors import UserError, VerificationError, first_line

_STANDARD_ERROR = 2
_SECONDS_TO_END = 30.0
_SECONDS_BETWEEN_TRIES = 0.5
_QUESTION = "Say hello."


class Engine:
    """A running engine.

    Args:
        command: how it was started.
        place: where it listens.
        process: the leader of a process group of its own.
    """

    def __init__(self, command: EngineCommand, place: Place, process: "subprocess.Popen[bytes]") -> None:
        self._command, self._place, self._process = command, place, process

    @property
    def url(self) -> str:
        """What clients of OpenAI's interface need as `base_url`."""
        return f"{url_of(self._place.host, self._place.port)}/v1"

    def wait_until_it_answers(self, seconds: float) -> dict[str, str]:
        """Wait until the engine lists its models, ask each of them one question, and return the answers.

        Args:
            seconds: how long it may take to load.

        Raises:
            VerificationError: it ended, did not list its models in time, or one of them does not answer.
        """
        deadline = time.monotonic() + seconds
        listed: set[str] = set()
        problem = "it does not listen"
        while not set(self._command.models) <= listed:
            if self._process.poll() is not None:
                raise VerificationError(ended(self._command.engine, self._process.returncode))
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(set(self._command.models) - listed))
                raise VerificationError(
                    f"after {seconds:.0f} seconds {self._command.engine} does not serve {missing}: {problem}"
                )
            time.sleep(_SECONDS_BETWEEN_TRIES)
            try:
                listed = self._listed()
                problem = f"it lists {', '.join(sorted(listed)) or 'no model'}"
            except (OSError, ValueError) as error:
                problem = first_line(error)
        return {model: self._ask(model, max(30.0, deadline - time.monotonic())) for model in self._command.models}

    def _listed(self) -> set[str]:
        if self._command.engine == "transformers":
            # It lists what is in the cache of the hub, which need not exist, and serves what it was given.
            self._request(f"{self.url.removesuffix('/v1')}/health")
            return set(self._command.models)
        return {str(model.get("id")) for model in self._request(f"{self.url}/models").get("data", [])}

    def wait(self) -> int:
        """Wait until the engine ends, and return its status."""
        return self._process.wait()

    def _ask(self, model: str, seconds: float) -> str:
        message = {"role": "user", "content": _QUESTION}
        body = {"model": model, "messages": [message], "max_tokens": 16, "temperature": 0}
        try:
            reply = self._request(f"{self.url}/chat/completions", body, seconds)
            answer = reply["choices"][0]["message"]
        except urllib.error.HTTPError as error:
            with contextlib.suppress(OSError):
                detail = error.read(500).decode("utf-8", "replace")
            raise VerificationError(f"{model} does not answer: HTTP {error.code}: {detail}") from error
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise VerificationError(f"{model} does not answer: {type(error).__name__}: {first_line(error)}") from error
        return str(answer.get("content") or answer.get("reasoning_content") or "")

    def _request(self, url: str, body: dict[str, Any] | None = None, seconds: float = 10.0) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._place.key is not None:
            headers["Authorization"] = f"Bearer {self._place.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)  # noqa: S310 - http, by `url`
        # A proxy of the environment must not be asked for this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=seconds) as reply:
            return json.load(reply)


def ended(engine: str, status: int) -> str:
    """Say how an engine ended; a status below 0 is that of a signal."""
    if status == -signal.SIGILL:
        return f"{engine} was killed by SIGILL: it was built for another processor"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{engine} {how}; its message is above"


@contextmanager
def running(command: EngineCommand, place: Place) -> Iterator[Engine]:
    """Start an engine, and end it with all its processes when the block ends, however that happens.

    Raises:
        UserError: its program cannot be started.
    """
    try:
        # A group of its own: Ctrl-C of the terminal comes here alone, and workers are ended with their leader.
        environment = {**os.environ, **command.environment}
        # Its messages go to standard error, where those of peftchat go.
        process = subprocess.Popen(
            command.arguments, env=environment, stdin=subprocess.DEVNULL, stdout=_STANDARD_ERROR, start_new_session=True
        )
    except OSError as error:
        raise UserError(f"the program cannot be started: {error.strerror}", where=command.arguments[0]) from error
    try:
        yield Engine(command, place, process)
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process group: politely, and after a while at once."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            continue
        # Workers may outlive their leader.
        if number == signal.SIGTERM and _has_members(process.pid):
            time.sleep(_SECONDS_BETWEEN_TRIES)
            continue
        return


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True
