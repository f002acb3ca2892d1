"""What the page keeps: training examples, preference pairs and votes, each a file of JSON lines in one folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.kept_lines import KeptLines
from peftchat.output_paths import InputPath, check_output
from peftchat.web.votes import BlindRound, VoteFile

EXAMPLES, PAIRS, VOTES = "examples.jsonl", "pairs.jsonl", "votes.jsonl"


class KeptFiles:
    """The folder with what users keep; it is made with the first thing kept.

    Args:
        folder: the folder.
        models: what the page reads, which the folder must not hold.

    Raises:
        UserError: the folder may not be written, or a file of these names holds something else.
    """

    def __init__(self, folder: Path, models: list[str]) -> None:
        where = f"-o {folder}"
        inputs = [InputPath(Path(name), "a model that is served") for name in models if Path(name).exists()]
        check_output(folder, inputs, where)
        if folder.exists() and not folder.is_dir():
            raise UserError("expected a folder, got a file", where=where, hint="Choose another output.")
        self.folder = folder
        self.votes = VoteFile(folder / VOTES)
        self._examples = _checked(folder / EXAMPLES, {"messages"})
        self._pairs = _checked(folder / PAIRS, {"chosen", "rejected"})

    def keep_example(self, record: Mapping[str, Any]) -> str:
        """Add a conversation as a training example and return what to tell the user."""
        return _keep(self._examples, record, "example")

    def keep_pair(self, blind: BlindRound, system: str | None, tools: str | None = None) -> str:
        """Add the two conversations of a decided vote as a preference pair and return what to tell the user.

        Raises:
            UserError: nobody has voted, or nobody won.
        """
        preferred = None if blind.vote is None else blind.vote.preferred
        if preferred is None:
            raise UserError("a pair needs a vote for one side")
        first = [] if system is None else [Message("system", system)]
        sides = {name: [*first, *turns] for name, turns in blind.sides()}
        rejected = next(name for name in sides if name != preferred)
        record = {
            "chosen": [turn.as_dict() for turn in sides[preferred]],
            "rejected": [turn.as_dict() for turn in sides[rejected]],
        }
        return _keep(self._pairs, record if tools is None else {**record, "tools": tools}, "pair")


def _checked(path: Path, keys: set[str]) -> KeptLines:
    lines = KeptLines(path)
    for number, record in enumerate(lines.read(), start=1):
        if not keys <= record.keys():
            what = f"the line has no {' and '.join(sorted(f'`{key}`' for key in keys))}, so the file is not the page's"
            raise UserError(what, where=f"{path}:{number}", hint="Choose another folder with -o.")
    return lines


def _keep(lines: KeptLines, record: Mapping[str, Any], what: str) -> str:
    kept = lines.read()
    if record in kept:
        return f"This {what} is in {lines.path} already."
    lines.append([record])
    return f"Kept as {what} {len(kept) + 1} in {lines.path}."
