"""Counting tokens with nothing but a tokenizer's file."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peftchat.conversation import Conversation
from peftchat.conversations.problems import ProblemLog, ReadOptions
from peftchat.conversations.readers import find_files
from peftchat.conversations.reading import read_conversations, read_numbered
from peftchat.conversations.splitting import fit_split
from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe import DataEntry, Recipe


_FILE = "tokenizer.json"


def has_tokenizer(folder: str) -> bool:
    """Whether the folder holds a tokenizer that can be counted with."""
    return (Path(folder) / _FILE).is_file()


class FileTokenCounter:
    """Counts the tokens of texts, without special tokens.

    Args:
        folder: of a model or tokenizer, with its `tokenizer.json`.

    Raises:
        UserError: there is none, or it cannot be read.
    """

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        if not has_tokenizer(folder):
            raise UserError(
                f"the folder has no {_FILE}",
                where=f"--tokenizer {folder}",
                hint="Give a model's folder, or save its tokenizer there with transformers' `save_pretrained`.",
            )
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(Path(folder) / _FILE))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the tokenizer cannot be read: {error}", where=f"--tokenizer {folder}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        return [len(item) for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


_CACHE_KIB = 4 * 1024
"""A larger cache of pages saves 3 µs a conversation, of more than 300 that all of the statistics take."""


class FirstSeen(NamedTuple):
    """A conversation and the part that it is in.

    Attributes:
        part: number of the part.
        where: `file:line`.
    """

    part: int
    where: str


class FirstSeenIndex:
    """The first occurrence of each key in each part.

    Args:
        file: where to keep them; whoever gives it removes it.
    """

    def __init__(self, file: Path) -> None:
        self._base = sqlite3.connect(file, isolation_level=None)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA synchronous = OFF")
        self._base.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._base.execute(
            "CREATE TABLE seen (key BLOB, part INTEGER, place BLOB, PRIMARY KEY (key, part)) WITHOUT ROWID"
        )
        self._base.execute("BEGIN")

    def see(self, key: bytes, part: int, where: str) -> dict[int, str]:
        """Note an occurrence; returns where the key was seen first before, by part."""
        rows = self._base.execute("SELECT part, place FROM seen WHERE key = ?", (key,)).fetchall()
        earlier = {number: place.decode(errors="surrogateescape") for number, place in rows}
        if part not in earlier:
            # Paths may hold bytes that are not UTF-8, as lone surrogates.
            place = where.encode(errors="surrogateescape")
            self._base.execute("INSERT INTO seen VALUES (?, ?, ?)", (key, part, place))
        return earlier

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()


@dataclass(frozen=True, slots=True)
class StatsPart:
    """Conversations that are counted together.

    Attributes:
        name: of the part.
        read: the conversations; bad rows go to the log.
    """

    name: str
    read: Callable[[ProblemLog], Iterator[Conversation]]


def parts_of_path(
    path: str, options: ReadOptions | None = None, *, subset: str | None = None, revision: str | None = None
) -> list[StatsPart]:
    """A file or hub id is one part, a folder whose files are named by split one a split.

    Args:
        path: a file, a folder, a pattern or a hub id.
        options: how to read it.
        subset: of a hub data set that has several.
        revision: of a hub data set.

    Raises:
        UserError: nothing there to read.
    """
    splits: list[str | None] = []
    if Path(path).is_dir():
        splits = [split for split in ("train", "eval", "test") if _has_split(path, split)]
    if not splits:
        find_files(path)
        splits = [None]

    def part(split: str | None) -> StatsPart:
        return StatsPart(
            path if split is None else f"{path} ({split})",
            lambda log: read_conversations(
                path, split=split, subset=subset, revision=revision, problems=log, options=options
            ),
        )

    return [part(split) for split in splits]


def parts_of_recipe(recipe: "Recipe") -> list[StatsPart]:
    """The training and the held-out conversations; each counts once, whatever the weight of its source."""
    data, seed = recipe.data, recipe.training.seed

    def read(entries: "Sequence[DataEntry]", log: ProblemLog) -> Iterator[Conversation]:
        found = read_numbered(entries, problems=log, consecutive=data.consecutive, weighted=False,
                              **recipe.answers_read)  # fmt: skip
        return (conversation for _, conversation in found)

    def read_train(log: ProblemLog) -> Iterator[Conversation]:
        return read(data.train, log)

    held_out = data.eval
    if held_out is not None:
        return [StatsPart("train", read_train), StatsPart("eval", lambda log: read(held_out, log))]
    if data.eval_fraction is None:
        return [StatsPart("train", read_train)]
    split = fit_split(read_train(ProblemLog()), data.eval_fraction, seed)

    def side(is_eval: bool) -> Callable[[ProblemLog], Iterator[Conversation]]:
        return lambda log: (one for one in read_train(log) if split.is_eval(one) == is_eval)

    return [StatsPart("train", side(False)), StatsPart("eval", side(True))]


def _has_split(path: str, split: str) -> bool:
    try:
        # Without a split in any name, `find_files` takes all files for None and none for a name.
        return bool(find_files(path, split))
    except UserError:
        return False
