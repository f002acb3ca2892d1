"""What an input form is: how to recognise its rows, and how to turn them into dialogues."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peftchat.conversation import Conversation
from peftchat.sources.options import ReadOptions
from peftchat.sources.problems import ProblemLog
from peftchat.sources.row import Row

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """One input form.

    Attributes:
        name: as written in a recipe's `format`.
        summary: one line: its fields.
        matches: whether a row has this form, judged by its fields alone.
        read: the dialogues in a stream of rows; bad rows go to the log.
        ranked: whether its answers come with ranks, so that `ReadOptions.top_k` means something.
    """

    name: str
    summary: str
    matches: Callable[[Fields], bool]
    read: Callable[[Iterable[Row], ReadOptions, ProblemLog], Iterator[Conversation]]
    ranked: bool = False
