"""What is looked at, side by side: files, the splits of a folder, the sides of a recipe."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.conversation import Conversation
from peftchat.errors import UserError
from peftchat.sources.mixing import read_entries
from peftchat.sources.problems import ProblemLog
from peftchat.sources.readers import find_files
from peftchat.sources.reading import read_conversations
from peftchat.sources.splitting import settle_split

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


@dataclass(frozen=True, slots=True)
class StatsPart:
    """Dialogues that are counted together.

    Attributes:
        name: of the part.
        read: the dialogues; bad rows go to the log.
    """

    name: str
    read: Callable[[ProblemLog], Iterator[Conversation]]


def parts_of_path(path: str) -> list[StatsPart]:
    """A file or hub id is one part, a folder whose files are named by split one a split.

    Raises:
        InputError: nothing there to read.
    """
    if not Path(path).expanduser().is_dir():
        find_files(path)
        return [_part(path, path, None)]
    splits = [split for split in ("train", "eval", "test") if _has_split(path, split)]
    if not splits:
        find_files(path)
        return [_part(path, path, None)]
    return [_part(f"{path} ({split})", path, split) for split in splits]


def parts_of_recipe(recipe: "Recipe") -> list[StatsPart]:
    """The training and the held-out dialogues; each counts once, whatever the weight of its source."""
    data, seed = recipe.data, recipe.training.seed
    train = [entry.model_copy(update={"weight": 1.0}) for entry in data.train]

    def read_train(log: ProblemLog) -> Iterator[Conversation]:
        return read_entries(train, seed, problems=log)

    if data.eval is not None:
        held_out = [entry.model_copy(update={"weight": 1.0}) for entry in data.eval]
        return [
            StatsPart("train", read_train),
            StatsPart("eval", lambda log: read_entries(held_out, seed, problems=log)),
        ]
    if data.eval_fraction is None:
        return [StatsPart("train", read_train)]
    split = settle_split(read_train(ProblemLog()), data.eval_fraction, seed)

    def side(is_eval: bool) -> Callable[[ProblemLog], Iterator[Conversation]]:
        return lambda log: (one for one in read_train(log) if split.is_eval(one) == is_eval)

    return [StatsPart("train", side(False)), StatsPart("eval", side(True))]


def _part(name: str, path: str, split: str | None) -> StatsPart:
    return StatsPart(name, lambda log: read_conversations(path, split=split, problems=log))


def _has_split(path: str, split: str) -> bool:
    try:
        # Without a split in any name, `find_files` takes all files for None and none for a name.
        return bool(find_files(path, split))
    except UserError:
        return False
