"""Libraries that talk over our own display."""

import logging
import os
import warnings

_TALKATIVE = ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "torch.distributed", "accelerate", "peft")


def quiet_libraries() -> None:
    """Let libraries report errors only. To be called before they are imported: some speak while they are."""
    for name in _TALKATIVE:
        # Some set their own level when they are imported; a filter outlives that.
        logging.getLogger(name).addFilter(_is_error)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Not one of them is about anything that a recipe says.
    warnings.filterwarnings("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
