"""Encoding in several processes: the examples of one process, in its order, and its errors."""

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import ExampleBatch
from peftchat.conversation import Conversation, Message
from peftchat.dataset import encode
from peftchat.errors import UserError
from tests.support.forks import watch_forks
from tests.support.template_families import FAMILIES
from tests.unit.chat_template.test_template_families import tokenizer_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="one process encodes there")
BATCH = 7


def conversations(count: int) -> Iterator[Conversation]:
    for number in range(count):
        turns = [Message("user", f"What is {number}?"), Message("assistant", f"A number, {number}.")]
        yield Conversation(tuple(turns * (1 + number % 3)), source=f"data.jsonl:{number + 1}")


def encoder_of(family: str) -> ChatEncoder:
    return make_format("model", None, tokenizer_of(family)).encoder()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that were started; they begin after the first batches."""
    monkeypatch.setattr(encode, "_RENDERED_BATCH", BATCH)
    monkeypatch.setattr(encode, "_SECONDS_ALONE", -1)
    monkeypatch.setattr(encode, "usable_cores", lambda: 3)
    return watch_forks(monkeypatch)


def encoded(encoder: ChatEncoder, given: Iterator[Conversation]) -> list[tuple[Sequence[Conversation], ExampleBatch]]:
    return list(encode.encode_ahead(encoder, given, encoder.batch))


@pytest.mark.parametrize("family", sorted(FAMILIES)[:3])
def test_several_processes_make_what_one_makes(family: str, started: list[int]) -> None:
    found = encoded(encoder_of(family), conversations(60))
    assert len(started) == 3
    expected = encoder_of(family).batch(conversations(60))
    assert [one for batch, _ in found for one in batch] == list(conversations(60))
    assert np.concatenate([made.ids for _, made in found]).tolist() == expected.ids.tolist()
    assert np.concatenate([made.token_tags for _, made in found]).tolist() == expected.token_tags.tolist()
    assert [source for _, made in found for source in made.sources] == list(expected.sources)


def test_what_a_template_refuses_is_told_with_its_place(started: list[int]) -> None:
    def given() -> Iterator[Conversation]:
        yield from conversations(50)
        yield Conversation((Message("user", "Hi"), Message("tool", "17"), Message("assistant", "Yes")), "data.jsonl:51")
        yield from conversations(10)

    with pytest.raises(UserError) as alone:
        encoder_of("gemma").batch(given())
    with pytest.raises(UserError) as told:
        encoded(encoder_of("gemma"), given())
    assert len(started) == 3
    assert str(told.value) == str(alone.value)
    assert "data.jsonl:51" in str(told.value)


def test_a_process_that_was_killed_is_an_error(started: list[int]) -> None:
    encoder = encoder_of("gemma")
    stream = encode.encode_ahead(encoder, conversations(400), encoder.batch)
    while not started:
        next(stream)
    os.kill(started[0], signal.SIGKILL)
    with pytest.raises(UserError, match="encodes conversations was ended from outside"):
        list(stream)
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_end_with_the_encoding(started: list[int]) -> None:
    encoder = encoder_of("gemma")
    stream = encode.encode_ahead(encoder, conversations(400), encoder.batch)
    while not started:
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_quick_templates_and_single_cores_start_none(started: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(make_format("chatml", None, tokenizer_of("chatml")).encoder(), conversations(60))
    monkeypatch.setattr(encode, "usable_cores", lambda: 1)
    encoded(encoder_of("gemma"), conversations(60))
    assert started == []


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_limit_of_processes_slows_down_only(
    allowed: int, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = os.fork

    def limited() -> int:
        if len(started) == allowed:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    found = encoded(encoder_of("gemma"), conversations(60))
    assert [one for batch, _ in found for one in batch] == list(conversations(60))
    assert len(started) == allowed
