"""What a file of blind votes says, for `peftchat judge`."""

from pathlib import Path

import click

from peftchat.cli.common import echo_json, note
from peftchat.errors import UserError


def report_votes(path: Path, context: click.Context, *, as_json: bool) -> None:
    """Print the share of each pair of models with its interval.

    Args:
        path: the votes of `peftchat web`, or of FastChat's Chatbot Arena.
        context: of the command, whose other options concern answers.
        as_json: whether to print JSON.

    Raises:
        UserError: the file holds no votes, or an option concerns answers.
    """
    from peftchat.web.votes import VoteFile, tally

    hint = "Leave it out, or give two files of answers."
    for parameter in context.command.params:
        is_given = context.get_parameter_source(str(parameter.name)) is click.core.ParameterSource.COMMANDLINE
        if is_given and parameter.name not in ("answers_a", "as_json"):
            raise UserError(
                "a single file is one of votes, which are judged already", where=parameter.opts[0], hint=hint
            )
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), hint="Check the path.")
    votes = VoteFile(path).votes
    if not votes:
        raise UserError("the file holds no votes", where=str(path), hint="Vote with `peftchat web MODEL MODEL`.")
    pairs = tally(votes)
    if as_json:
        echo_json({"votes": len(votes), "judges": sorted({vote.judge for vote in votes}), "pairs": [
            {"model": pair.first, "other": pair.second, "wins": pair.wins, "losses": pair.losses, "ties": pair.ties,
             "share": pair.share, "interval": list(pair.interval)} for pair in pairs
        ]})  # fmt: skip
        return
    from rich.table import Table

    from peftchat.console import print_table

    table = Table("model", "other", "wins", "losses", "ties", "share", "95 % interval", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for pair in pairs:
        low, high = pair.interval
        counts = (str(pair.wins), str(pair.losses), str(pair.ties))
        table.add_row(pair.first, pair.second, *counts, f"{pair.share:.0%}", f"{low:.0%} to {high:.0%}")
    print_table(table)
    for pair in pairs:
        low, high = pair.interval
        if low <= 0.5 <= high:
            note(f"{pair.first} and {pair.second}: {pair.count} votes do not tell which is better.")
