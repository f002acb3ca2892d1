"""Server of a comparison's processes: it imports the libraries once and forks for every run and every evaluation.

Importing them takes several seconds per process, which is longer than a short run of a small model. A fork has a memory
and an end of its own, so that a run is the same as in a new interpreter, and its failure ends nothing
else. The server neither starts a thread nor computes anything, as a fork copies neither threads nor their state.

It reads one JSON line per process from standard input, `{"arguments": […], "log": …}`, and answers with two lines: the
process id, and the exit status once the process has ended (negative for a signal, as `subprocess` has it).
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from peftchat.child_process import child_environment, end_with_parent

_MODULES = (
    "accelerate", "datasets", "peft", "tokenizers", "transformers", "trl",
    "peftchat.cli.main", "peftchat.training.train", "peftchat.planning.auto_settings", "peftchat.merging",
    "peftchat.serving.chat_model", "peftchat.reports.run_terminal",
)  # fmt: skip
"""What runs and evaluations import."""


def serve(channel: int) -> tuple[Sequence[str], str] | None:
    """Answer requests until standard input ends; returns in every fork, with what it has to run and its log.

    Args:
        channel: the file descriptor for answers.
    """
    for line in sys.stdin.buffer:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.close(channel)
            return request["arguments"], request["log"]
        os.write(channel, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(channel, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return None


def run(arguments: Sequence[str], log: str) -> NoReturn:
    """Run `python -m ARGUMENTS` in this fork, and end as an interpreter does, without tearing down the modules."""
    os.environ.update(child_environment({}, os.getppid()))
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        file = os.open(path, flags, 0o666)
        os.dup2(file, target)
        os.close(file)
    os.dup2(1, 2)
    sys.argv = list(arguments)
    status = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    # What `Py_FinalizeEx` does first: wait for threads, and call what `atexit` was given.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def warm_up() -> None:
    """Make what libraries make once in a process, and every run needs: a second of a short run's four.

    None of it depends on a recipe, computes with tensors, or draws a random number.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from peftchat.reports.page import load_template

    # Accelerate imports it wherever it is installed. If that fails, a run tells it as any process does.
    with suppress(Exception):
        importlib.import_module("deepspeed")
    # transformers compiles the patterns of all architectures at the first model that is loaded.
    get_checkpoint_conversion_mapping("llama")
    for name in ("page.html.jinja", "run_report.html.jinja"):
        load_template(name)


def main() -> None:
    """Import the libraries and serve."""
    end_with_parent()
    # An interrupt of the terminal reaches the whole family; the comparison ends its processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.dup(1)
    os.dup2(2, 1)
    from peftchat.library_setup import prepare_libraries

    prepare_libraries()
    for name in _MODULES:
        importlib.import_module(name)
    warm_up()
    gc.freeze()
    requested = serve(channel)
    if requested is not None:
        run(*requested)


if __name__ == "__main__":
    main()
