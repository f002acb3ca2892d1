"""Several sources as one stream."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Protocol

from peftchat.conversation import Conversation
from peftchat.sources.fingerprint import seeded_fraction
from peftchat.sources.options import ReadOptions
from peftchat.sources.problems import ProblemLog
from peftchat.sources.reading import read_conversations


class Entry(Protocol):
    """What a recipe says about one source."""

    @property
    def path(self) -> str:
        """A file, a folder or a hub id."""

    @property
    def format(self) -> str:
        """An input form, or `auto`."""

    @property
    def split(self) -> str | None:
        """The split of a folder or hub data set."""

    @property
    def weight(self) -> float:
        """How many times each dialogue is used, see `read_entries`."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages to keep, see `ReadOptions`."""

    @property
    def top_k(self) -> int | None:
        """How many replies to follow, see `ReadOptions`."""


def read_entries(
    entries: Sequence[Entry],
    seed: int = 0,
    *,
    problems: ProblemLog | None = None,
) -> Iterator[Conversation]:
    """The dialogues of several sources, one source after the other, each dialogue as often as its source's weight says.

    Weight 1 uses every dialogue once, 2 twice, 0.5 a half, 1.5 every dialogue once and a half of them twice. Which
    half depends on `seed` and the dialogue's place alone. Shuffling is left to whoever draws batches.

    Raises:
        InputError: as `read_conversations`; paths and formats of all entries are checked before the first dialogue.
    """
    log = ProblemLog(strict=True) if problems is None else problems
    streams = [
        _weighted(
            read_conversations(
                entry.path,
                format=entry.format,
                split=entry.split,
                problems=log,
                options=ReadOptions(languages=entry.languages, top_k=entry.top_k),
            ),
            entry.weight,
            f"{seed} {place}",
            log,
        )
        for place, entry in enumerate(entries)
    ]
    return chain.from_iterable(streams)


def _weighted(
    conversations: Iterator[Conversation], weight: float, seed: str, problems: ProblemLog
) -> Iterator[Conversation]:
    if weight == 1:
        yield from conversations
        return
    whole, share = divmod(weight, 1)
    for number, conversation in enumerate(conversations):
        copies = int(whole) + (seeded_fraction(seed, str(number)) < share)
        if not copies:
            problems.skipped["left_out_by_weight"] += 1
        elif copies > 1:
            problems.notes["repeated_by_weight"] += copies - 1
        for _ in range(copies):
            yield conversation
