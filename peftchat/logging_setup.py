"""Log levels of libraries whose messages would interrupt the progress display."""

import logging
import os
import warnings

from peftchat.late_imports import postpone_imports

_LOGGERS = ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "torch.distributed", "accelerate", "peft")


def quiet_libraries() -> None:
    """Restrict libraries to errors, and postpone imports that they may not need.

    Call it before importing them, where a command or a function of the API begins: some log while they are imported.
    """
    postpone_imports()
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        # Loggers below it, such as `accelerate.accelerator`, go by its level and not by its filter.
        logger.setLevel(logging.ERROR)
        # Some set their own level when they are imported; a filter stays.
        logger.addFilter(_is_error)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Warnings of its stores about names without an address, and stacks when another machine ends first.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # None of these warnings concerns a setting of the recipe.
    warnings.filterwarnings("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
