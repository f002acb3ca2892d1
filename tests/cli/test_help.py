"""The help of every command: complete, instant, and free of heavy libraries."""

import subprocess
import sys
from collections.abc import Iterator
from typing import get_args

import click
import pytest
from click.testing import CliRunner

from peftchat.cli.common import Command
from peftchat.cli.main import cli
from peftchat.recipe.sections import Method

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "pydantic", "numpy", "rich"}


def every_command(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, member in command.commands.items():
            yield from every_command(member, *path, name)


COMMANDS = dict(every_command(cli))
RENAMED = [
    (path, former, current)
    for path, command in COMMANDS.items()
    if isinstance(command, Command)
    for former, current in command.renamed.items()
]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_complete(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*path, "--help"], prog_name="peftchat", terminal_width=200, max_content_width=200)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: {' '.join(['peftchat', *path])} ")
    assert "..." not in done.stdout.partition("Commands:")[2], "a summary is cut"


def test_no_help_imports_a_heavy_library() -> None:
    code = f"""
import sys
from click.testing import CliRunner
from peftchat.cli.main import cli
for path in {list(COMMANDS)!r}:
    done = CliRunner().invoke(cli, [*path, "--help"])
    assert done.exit_code == 0, (path, done.output)
    print(*path, *sorted({HEAVY!r} & set(sys.modules)), sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["|".join(path) for path in COMMANDS]


def test_summaries_fit_an_ordinary_terminal() -> None:
    for path, command in COMMANDS.items():
        if path:
            assert not command.get_short_help_str(64).endswith("..."), path


@pytest.mark.parametrize(("path", "former", "current"), RENAMED, ids=lambda part: str(part))
def test_former_spellings_are_accepted_and_noted(path: tuple[str, ...], former: str, current: str) -> None:
    command = COMMANDS[path]
    options = {spelling for parameter in command.params for spelling in [*parameter.opts, *parameter.secondary_opts]}
    assert current in options and former not in options
    assert former not in command.get_help(click.Context(command)).split()
    done = CliRunner().invoke(cli, [*path, former, "--help"])
    # The note comes before the help, or before the complaint that the option needs a value.
    assert done.stderr.splitlines()[0] == f"`{former}` is now `{current}`."


def test_only_the_option_itself_is_replaced() -> None:
    seen = []

    @click.command(cls=Command, renamed={"--ask": "--prompt"})
    @click.option("--prompt", multiple=True)
    @click.argument("rest", nargs=-1)
    def command(prompt: tuple[str, ...], rest: tuple[str, ...]) -> None:
        seen.append((prompt, rest))

    done = CliRunner().invoke(command, ["--ask", "a", "--ask=b=--ask", "--", "--ask"])
    assert (done.exit_code, seen) == (0, [(("a", "b=--ask"), ("--ask",))])
    assert done.stderr.splitlines() == ["`--ask` is now `--prompt`."]


def test_init_offers_the_methods_of_recipes() -> None:
    (option,) = [parameter for parameter in COMMANDS["init",].params if parameter.name == "method"]
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(get_args(Method))
