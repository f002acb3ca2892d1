"""What several commands share: options, former spellings, JSON output, progress."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from peftchat.interruption import Interrupted

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SECONDS_BETWEEN_UPDATES = 0.1


class OrderedGroup(click.Group):
    """A group that lists its commands in the order in which they were added: that of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C gets past click, which would write an empty line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(signal.SIGINT) from error


class Command(click.Command):
    """A command that accepts former spellings of its options and hides them from the help.

    Args:
        renamed: former spelling -> the option that replaced it.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, former spellings replaced and each noted on standard error."""
        return super().parse_args(ctx, self._current_spellings(args))

    def _current_spellings(self, args: Sequence[str]) -> list[str]:
        options_end = args.index("--") if "--" in args else len(args)
        current = list(args)
        noted = set()
        for index, argument in enumerate(args[:options_end]):
            former, equals, value = argument.partition("=")
            if former in self.renamed:
                current[index] = f"{self.renamed[former]}{equals}{value}"
                if former not in noted:
                    note(f"`{former}` is now `{self.renamed[former]}`.")
                noted.add(former)
        return current


class VariadicCommand(click.Command):
    """A command with options that take all words up to the next option: `--models A B`.

    Args:
        variadic: these options; each is declared with `multiple=True`.
    """

    def __init__(self, *args: Any, variadic: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.variadic = frozenset(variadic)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, with the option's name repeated before each of its words."""
        repeated: list[str] = []
        current: str | None = None
        count = 0
        for index, argument in enumerate(args):
            if argument == "--":
                repeated += args[index:]
                break
            if argument.startswith("-"):
                current, count = (argument if argument in self.variadic else None), 0
            elif current is not None:
                repeated += [current] * (count > 0)
                count += 1
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


class PathType(click.ParamType):
    """A path, in which `~` and environment variables are replaced, whether or not the shell has done so.

    Args:
        name: what the help calls it.
    """

    def __init__(self, name: str = "path") -> None:
        self.name = name

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        return value if isinstance(value, Path) else Path(_expanded(value, param))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete the names of files and folders."""
        return _shell_files(incomplete)


class RecipeType(PathType):
    """The path of a recipe; where no such file is, that of the recipe of this name that came with the package."""

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        path = super().convert(value, param, ctx)
        if path.exists() or path.is_symlink():
            return path
        from peftchat.recipe.shipped import find_shipped_recipe

        shipped = find_shipped_recipe(path)
        if shipped is None:
            return path
        note(f"{path} does not exist here; taking the recipe that came with peftchat: {shipped}")
        return shipped

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete files; where none begins so, offer the recipes that came with the package."""
        from peftchat.recipe.shipped import shipped_recipes

        # Click's script for bash takes either names or files, so names are offered only where no file would be.
        names = [spelling for one in shipped_recipes() for spelling in (one.name, f"recipes/{one.path.name}")]
        offered = beginning_with(incomplete, names)
        if not incomplete or not offered or _begins_a_file(incomplete):
            return _shell_files(incomplete)
        return offered


class NameType(click.ParamType):
    """A path, as for `PathType`, or a name such as a hub id; it stays text."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the path or name."""
        return _expanded(value, param)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete the names of files and folders."""
        return _shell_files(incomplete)


def beginning_with(incomplete: str, names: Iterable[str]) -> list[CompletionItem]:
    """Return the names that the shell offers for the beginning of a word."""
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _shell_files(incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def _begins_a_file(incomplete: str) -> bool:
    folder, beginning = os.path.split(incomplete)
    try:
        return any(path.name.startswith(beginning) for path in Path(folder or ".").iterdir())
    except OSError:
        return False


def _expanded(value: str, param: click.Parameter | None) -> str:
    from peftchat.paths import expand_path

    where = "argument" if param is None else param.human_readable_name
    return expand_path(value, param.opts[0] if isinstance(param, click.Option) else where)


def set_option() -> Callable[[_Function], _Function]:
    """Return the option `--set`, as the parameter `overrides`."""
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; the value is YAML. Repeatable."
    )


def allow_changed_option() -> Callable[[_Function], _Function]:
    """Return the flag `--allow-changed`."""
    return click.option(
        "--allow-changed",
        is_flag=True,
        help="Go on although base, tokenizer, template or data are not those of the run; record the change.",
    )


def base_option() -> Callable[[_Function], _Function]:
    """Return the option `--base`, a folder or a hub id."""
    return click.option(
        "--base", type=NameType(), metavar="MODEL", help="Folder or hub id of an adapter's base that has moved."
    )


def json_option(help: str = "Print one JSON object and nothing else.") -> Callable[[_Function], _Function]:
    """Return the flag `--json`, as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def output_option(help: str, **attributes: Any) -> Callable[[_Function], _Function]:
    """Return the option `-o/--output`, a path, as the parameter `output`; `attributes` are click's own."""
    return click.option("-o", "--output", type=PathType(), help=help, **attributes)


def echo_json(value: object) -> None:
    """Write one JSON value and a line break to standard output."""
    click.echo(json.dumps(value))


def note(message: str, style: str | None = None) -> None:
    """Write one line to standard error, once per run: the first of several processes writes it."""
    from peftchat.console import stderr

    if os.environ.get("RANK", "0") == "0":
        stderr.print(message, style=style, markup=False, highlight=False)


@contextmanager
def conversation_progress(activity: str) -> Iterator[Callable[[int], None]]:
    """Show a running count of conversations on standard error; the block calls it with the count so far."""
    from peftchat.console import stderr

    started = shown = time.monotonic()
    with stderr.status(f"{activity} …") as status:

        def advance(conversations: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= _SECONDS_BETWEEN_UPDATES:
                shown = now
                rate = conversations / (now - started)
                status.update(f"{activity}: {conversations:,} conversations, {rate:,.0f} per second")

        yield advance
