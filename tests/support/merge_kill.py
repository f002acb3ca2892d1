"""Start merges and kill each at a random moment; prints how many were cut off before the folder had its name.

Run as `python -m tests.support.merge_kill RUN OUT TURNS`. Everything is imported once and every merge runs in a fork,
so that the time is spent where the killing is.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import huggingface_hub  # noqa: F401
import peft.utils.save_and_load  # noqa: F401
import transformers.conversion_mapping
import transformers.core_model_loading
import transformers.models.llama.modeling_llama  # noqa: F401

from peftchat.merging import MergeOptions, merge_run


def start(run: Path, target: Path) -> int:
    """Begin a merge in a fork and return its process id as soon as something of it is on the disk."""
    child = os.fork()
    if child == 0:
        merge_run(run, MergeOptions(output=target, verify=False))
        os._exit(0)
    while not target.with_name(f"{target.name}.partial").exists() and not target.exists():
        time.sleep(0.0002)
    return child


def main(run: Path, out: Path, turns: int) -> None:
    """One merge is timed to its end; the others are killed at moments spread over that time."""
    chance = random.Random(0)
    child = start(run, out / "timed")
    begin = time.monotonic()
    os.waitpid(child, 0)
    span = time.monotonic() - begin
    cut = 0
    for turn in range(turns):
        target = out / f"out{turn}"
        child = start(run, target)
        time.sleep(chance.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut += not target.exists()
    print(cut)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
