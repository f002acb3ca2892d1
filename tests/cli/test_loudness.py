"""`--quiet` and `--verbose`, before and after the command, and `--json` of every command."""

import json
import os
from pathlib import Path

import click
import pytest

from peftchat.library_setup import VERBOSE, hear_libraries, prepare_libraries
from tests.cli.test_help import COMMANDS
from tests.support.cli import peftchat

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(TALK), encoding="utf-8")
    return path


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_quiet_leaves_results_and_errors(after: bool, talks: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> tuple[str, str]:
        done = peftchat(*(arguments if after else ()), "--quiet", *(() if after else arguments))
        return done.stdout, done.stderr

    shown, said = run("data", "prepare", talks, "-o", tmp_path / "clean", "--eval-fraction", "0")
    assert "records read" in shown
    assert said == ""
    _, said = run("data", "stats", tmp_path / "nothing.jsonl")
    assert said.startswith("Error: ")


def test_verbose_lets_libraries_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VERBOSE, "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    prepare_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    hear_libraries()
    prepare_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_json(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    if not isinstance(command, click.Group):
        assert any("--json" in parameter.opts for parameter in command.params)
