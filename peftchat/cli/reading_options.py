"""Options of commands that read data files: the same keys, with the same meaning, as in a recipe."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FOLLOW = {"columns": "prompt=ask,completion=reply", "roles": "customer=user,agent=assistant"}


class HubKeys(NamedTuple):
    """Which part of a hub data set is read.

    Attributes:
        subset: of a data set that has several.
        revision: branch, tag or commit.
    """

    subset: str | None = None
    revision: str | None = None


def reading_options(function: _Function) -> _Function:
    """Add `--columns`, `--roles`, `--consecutive`, `--subset` and `--revision`."""
    options = [
        click.option(
            "--columns",
            callback=_parse_columns,
            multiple=True,
            metavar="OURS=THEIRS,…",
            help=f"The file's names of fields: {_FOLLOW['columns']}. Repeatable.",
        ),
        click.option(
            "--roles",
            callback=_parse_roles,
            multiple=True,
            metavar="THEIRS=OURS,…",
            help=f"The file's names of roles: {_FOLLOW['roles']}. Repeatable.",
        ),
        click.option(
            "--consecutive",
            type=click.Choice(["error", "merge", "keep"]),
            default="error",
            show_default=True,
            help="Two turns of one role: refuse the record, join them, or keep them.",
        ),
        click.option("--subset", help="Subset of a hub dataset."),
        click.option("--revision", help="Branch, tag or commit of a hub dataset."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def oasst_pairs_option(function: _Function) -> _Function:
    """Add `--oasst-pairs`."""
    option = click.option(
        "--oasst-pairs",
        type=click.Choice(["best_worst", "adjacent", "all"]),
        help="OpenAssistant, with --pairs: the best reply and the worst (default), neighbors in rank, or every two.",
    )
    return option(function)


def check_pairs_are_read(pairs: bool, rule: str | None, *, labels: bool) -> None:
    """Check that pairs or labeled answers are read, not both, and pairs where an option says which ones.

    Raises:
        UserError: they are not.
    """
    from peftchat.errors import UserError

    if pairs and labels:
        raise UserError(
            "a record is read as a pair or as labeled answers, not as both",
            where="--labels",
            hint="Leave one of --pairs and --labels out; `objective: kto` reads labels, the others read pairs.",
        )
    if rule is not None and not pairs:
        raise UserError(
            "the option chooses preference pairs, and conversations are read",
            where=f"--oasst-pairs {rule}",
            hint="Add --pairs, or leave the option out.",
        )


def _parse_columns(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    from peftchat.recipe.sections import ColumnName

    return _pairs("columns", values, ColumnName, ours_first=True)


def _parse_roles(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    from peftchat.conversation import Role
    from peftchat.conversations.formats.names import normalize_role

    return {normalize_role(name): role for name, role in _pairs("roles", values, Role, ours_first=False).items()}


def _pairs(option: str, values: tuple[str, ...], ours: Any, *, ours_first: bool) -> dict[str, str]:
    """The pairs of an option, each side checked.

    Args:
        option: its name.
        values: as given, one for each time that the option stands there.
        ours: the type of our own names.
        ours_first: whether the key of a pair is our name.

    Raises:
        UserError: a pair is incomplete, there twice, or names something that we do not know.
    """
    import difflib
    from typing import get_args

    from peftchat.errors import UserError

    known = get_args(ours)
    pairs: dict[str, str] = {}
    value = ",".join(values)
    for pair in value.split(",") if value else []:
        key, equals, meaning = (part.strip() for part in pair.partition("="))
        where = f"--{option} {value}"
        if not (key and equals and meaning):
            raise UserError(f"{pair!r} is not NAME=NAME", where=where, hint=f"Write {_FOLLOW[option]}.")
        if key in pairs:
            raise UserError(f"`{key}` is there twice", where=where, hint="Give each name once.")
        name = key if ours_first else meaning
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            mean = f"Did you mean {nearest[0]!r}? " if nearest else ""
            raise UserError(
                f"unknown {'field' if ours_first else 'role'} `{name}`; known: {', '.join(known)}",
                where=where,
                hint=f"{mean}Write {_FOLLOW[option]}.",
            )
        pairs[key] = meaning
    return pairs
