"""Rows as they were before truncation, for looking at what was cut."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from peftchat.chatml.registry import ChatFormat
from peftchat.chatml.rows import Row
from peftchat.conversations import ProblemLog
from peftchat.training.data import Side, conversations

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


def with_whole_rows(recipe: "Recipe", chat: ChatFormat, side: Side, rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """Each row together with its dialogue encoded in full.

    The source is read once more, only as far as needed.

    Args:
        recipe: what the rows were encoded by.
        chat: its format.
        side: whose rows they are.
        rows: some of them, in their order.
    """
    encoder = chat.encoder()
    dialogues = conversations(recipe, side, ProblemLog(strict=True))
    whole: Row | None = None
    for row in rows:
        if whole is None or whole.source != row.source:
            found = next((dialogue for dialogue in dialogues if dialogue.source == row.source), None)
            whole = row if found is None else encoder.encode([found])[0]
        yield row, whole
