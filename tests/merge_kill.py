"""Start merges and kill each at a random moment; prints how many were cut off before the folder had its name.

Run as `python merge_kill.py RUN OUT TURNS`. Everything is imported once and every merge runs in a fork, so that the
time is spent where the killing is.
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


def main(run: Path, out: Path, turns: int) -> None:
    chance = random.Random(0)
    cut = 0
    for turn in range(turns):
        target = out / f"out{turn}"
        partial = target.with_name(f"{target.name}.partial")
        child = os.fork()
        if child == 0:
            merge_run(run, MergeOptions(out=target, verify=False))
            os._exit(0)
        while not partial.exists() and not target.exists():
            time.sleep(0.0002)
        time.sleep(chance.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut += not target.exists()
    print(cut)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
