"""Libraries are set up before they are imported: what they log, and how their threads wait."""

import logging
import os
import subprocess
import sys
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
import torch

from peftchat.library_setup import VERBOSE, prepare_libraries


@pytest.mark.parametrize("name", ["accelerate", "accelerate.accelerator", "peft.tuners.lora.layer", "DeepSpeed"])
def test_libraries_say_errors_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger's filter does not hold for those below it; its level does."""
    monkeypatch.delenv(VERBOSE, raising=False)
    prepare_libraries()
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


_LOAD_OPENMP = """
import ctypes, sys
from peftchat.library_setup import prepare_libraries
prepare_libraries()
ctypes.CDLL(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("own", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")]
)
def test_threads_of_openmp_sleep_soon_unless_the_user_says_how_they_wait(own: dict[str, str], count: str) -> None:
    """OpenMP itself is asked: it reads its settings when it is loaded."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not libraries:
        pytest.skip("this build of torch brings no GNU OpenMP")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_OPENMP, str(libraries[0])],
        env={**environment, **own, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
