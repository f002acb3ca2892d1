"""The command in a fresh interpreter: what a user meets first."""

import subprocess
import sys
from pathlib import Path

import pytest

from peftchat.cli.main import VERBS
from tests.support.cli import PROJECT, peftchat, true_peftchat


def test_help_names_every_verb() -> None:
    done = true_peftchat("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from peftchat.cli.main import cli; "
        f"cli({arguments!r}, standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "trl", "datasets"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["train", "no-such-recipe.yaml"], "no-such-recipe.yaml"), (["tran"], "tran"), (["train"], "RECIPE")],
    ids=["file", "verb", "argument"],
)
def test_a_mistake_is_one_message_and_status_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = true_peftchat(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    # The server that other tests use says the same.
    forked = peftchat(*arguments)
    assert (forked.returncode, forked.stdout, forked.stderr) == (done.returncode, done.stdout, done.stderr)
