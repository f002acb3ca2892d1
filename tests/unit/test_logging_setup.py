"""Log levels of libraries: what interrupts the progress display is left out, and errors are not."""

import logging

import pytest

from peftchat.logging_setup import VERBOSE, quiet_libraries


@pytest.mark.parametrize("name", ["accelerate", "accelerate.accelerator", "peft.tuners.lora.layer", "DeepSpeed"])
def test_libraries_say_errors_alone(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logger's filter does not hold for those below it; its level does."""
    monkeypatch.delenv(VERBOSE, raising=False)
    quiet_libraries()
    logging.getLogger(name).warning("a mismatch that is mended")
    assert not caplog.records
    logging.getLogger(name).error("a mismatch")
    # DeepSpeed's own handlers print, and pass nothing on.
    assert len(caplog.records) == logging.getLogger(name).propagate
