"""`--quiet` and `--verbose`: how much a command says on standard error, before or after its name."""

import os
from typing import TypeVar

import click

from peftchat.library_setup import QUIET, hear_libraries

_Command = TypeVar("_Command", bound=click.Command)


def accept_loudness(command: _Command, *, hidden: bool = False) -> _Command:
    """Let a command, and the commands below it, take `--quiet` and `--verbose`.

    Args:
        command: what takes them.
        hidden: whether they are left out of its help, because the help of `peftchat` has them.
    """
    command.params += [
        click.Option(
            ["--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_be_quiet,
            hidden=hidden,
            help="Say nothing but results and errors.",
        ),
        click.Option(
            ["--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_be_verbose,
            hidden=hidden,
            help="Let libraries tell what they do and warn of.",
        ),
    ]
    if isinstance(command, click.Group):
        for below in command.commands.values():
            accept_loudness(below, hidden=True)
    return command


def _be_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from peftchat.console import stderr

        stderr.quiet = True
        # For processes that are started.
        os.environ[QUIET] = "1"


def _be_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        hear_libraries()
