"""Log levels of libraries: what interrupts the progress display is left out, and errors are not."""

import logging
from logging.handlers import BufferingHandler

import pytest

from peftchat.logging_setup import VERBOSE, quiet_libraries


@pytest.mark.parametrize("name", ["accelerate", "accelerate.accelerator", "peft.tuners.lora.layer", "DeepSpeed"])
def test_libraries_say_errors_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger's filter does not hold for those below it; its level does."""
    monkeypatch.delenv(VERBOSE, raising=False)
    quiet_libraries()
    # Of its own: DeepSpeed's logger may pass nothing on to those above it.
    heard = BufferingHandler(capacity=10)
    logger = logging.getLogger(name)
    logger.addHandler(heard)
    try:
        logger.warning("a mismatch that is mended")
        logger.error("a mismatch")
    finally:
        logger.removeHandler(heard)
    assert [record.getMessage() for record in heard.buffer] == ["a mismatch"]
