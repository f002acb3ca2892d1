"""Interruptions that libraries wrap are found again."""

import signal

import pytest

from peftchat.interruption import Interrupted, interruption


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ('Error building "enum" validator:\n  Interrupted: Stopped by SIGTERM.\n', signal.SIGTERM),
        ('Error building "enum" validator:\n  KeyboardInterrupt: \n', signal.SIGINT),
        ("the value Interrupted is not allowed", None),
    ],
)
def test_an_interruption_of_which_only_the_words_are_left(words: str, number: int | None) -> None:
    found = interruption(ValueError(words))
    assert (None if found is None else found.status) == (None if number is None else 128 + number)


def test_an_interruption_that_was_wrapped() -> None:
    error = ImportError("a module failed")
    error.__cause__ = Interrupted(signal.SIGHUP)
    found = interruption(error)
    assert found is not None
    assert found.status == 128 + signal.SIGHUP
