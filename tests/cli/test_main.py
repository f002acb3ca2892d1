"""The command in a fresh interpreter: what a user meets first."""

from pathlib import Path

import pytest

from peftchat.cli.main import cli
from tests.support.cli import peftchat, true_peftchat


def test_help_names_every_verb() -> None:
    done = true_peftchat("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {verb} " in done.stdout for verb in cli.commands)


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
