"""A run where Windows' Python has no such module, function or signal: it trains, merges and leaves stock files.

Windows itself is not here. Third-party libraries are imported first, as they choose their own code by platform.
"""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.support.cli import PROJECT
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

AS_ON_WINDOWS = """
import importlib, os, pkgutil, signal, sys
for name in ("accelerate", "bitsandbytes", "click", "click._termui_impl", "click.utils", "datasets", "peft",
             "torch._dynamo", "transformers.trainer", "trl.trainer.sft_trainer", "subprocess",
             "multiprocessing.popen_spawn_posix"):
    importlib.import_module(name)
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
for name in ("fork", "getuid", "killpg", "mkfifo", "sched_getaffinity", "setsid"):
    delattr(os, name)
sys.platform = "win32"
import peftchat
from peftchat.cli.main import main
recipe, run = sys.argv[1:]
for arguments in (["plan", recipe], ["train", recipe], ["merge", run]):
    sys.argv = ["peftchat", *arguments]
    main()
# Only what runs programs of a model needs such a system, and the harness is an extra.
left_out = ("peftchat.__main__", "peftchat.evaluating.sandbox_runner", "peftchat.evaluating.harness_model")
for module in pkgutil.walk_packages(peftchat.__path__, "peftchat."):
    if module.name not in left_out:
        importlib.import_module(module.name)
"""


def test_nothing_that_windows_lacks_is_needed(tmp_path: Path) -> None:
    data = write_small_talk(tmp_path / "talk.jsonl")
    recipe = write_training_recipe(tmp_path / "recipe.yaml", small_model(tied=True), data, None, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, recipe, tmp_path / "run"], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "run/merged/model.safetensors")
