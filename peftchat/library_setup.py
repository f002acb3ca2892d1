"""Libraries before they are imported: their log levels, their threads, and imports that can wait."""

import logging
import os
import warnings

from peftchat.late_imports import postpone_imports

QUIET = "PEFTCHAT_QUIET"
"""Set by `--quiet`, also for processes that are started: no progress and no notes."""

VERBOSE = "PEFTCHAT_VERBOSE"
"""Set by `--verbose`, also for processes that are started: libraries are heard."""

_LOGGERS = ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "torch.distributed", "accelerate", "peft")
_VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Warnings of its stores about names without an address, and stacks when another machine ends first.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


_SPIN_COUNT = "1000"
"""Rounds of a loop in which a thread of GNU OpenMP waits for the others before it sleeps: some 20 microseconds.

By its own rule there are 300,000 as long as no more threads are asked for than there are cores, and 1,000 otherwise.
The rule does not see other processes. Beside them, threads that wait take the cores from those they wait for.
https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""


def prepare_libraries() -> None:
    """Restrict libraries to errors unless `--verbose` is given, and postpone imports that they may not need.

    Threads of a CPU are set to wait without keeping their cores busy, unless the user has set how they wait.

    Call it before importing them, where a command or a function of the API begins: some log while they are imported,
    and OpenMP reads its settings then.
    """
    postpone_imports()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if VERBOSE in os.environ:
        return
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        # Loggers below it, such as `accelerate.accelerator`, go by its level and not by its filter.
        logger.setLevel(logging.ERROR)
        # Some set their own level when they are imported; a filter stays.
        logger.addFilter(_is_error)
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    # None of these warnings concerns a setting of the recipe.
    warnings.filterwarnings("ignore")


def hear_libraries() -> None:
    """Undo `prepare_libraries`, before libraries are imported, and let them tell more than by default."""
    os.environ[VERBOSE] = "1"
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.removeFilter(_is_error)
    for name in _VARIABLES:
        os.environ.pop(name, None)
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    warnings.resetwarnings()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
