"""Conversations as they are written, many at a time: their lines, and what must be known of each, which is far less.

A large file is read by several processes, and what goes from one to the other is copied. The lines of a batch are one
block of bytes, which is neither pickled nor looked at again.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftchat.conversation import Conversation
from peftchat.conversations.dataset_card import SplitCount
from peftchat.conversations.formats import find_format
from peftchat.conversations.messages_file import columns_text, turns_text, written_place, written_turns
from peftchat.conversations.parts_of_file import PlainRecord
from peftchat.conversations.problems import ProblemLog, ReadOptions
from peftchat.conversations.readers.jsonl import read_lines
from peftchat.conversations.splitting import start_of_text

REREAD = ReadOptions(consecutive="keep", max_record_bytes=2**62)
"""How our own files are read."""
_BATCH_BYTES = 2**20


@dataclass(slots=True)
class Batch:
    """Some conversations; the lists have an entry for each.

    Attributes:
        lines: of the file, one behind the other.
        ends: where each line ends in `lines`.
        fingerprints: equal for conversations that say the same, as `conversation_fingerprint` has it.
        sources: their places.
        numbers: of the tentative split, in [0, 1).
        starts: names of the first user messages.
        messages: how many.
        answers: how many.
        characters: of all contents.
    """

    lines: bytes = b""
    ends: list[int] = field(default_factory=list)
    fingerprints: list[bytes] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the lines travel beside the pickle."""
        others = (
            self.ends, self.fingerprints, self.sources, self.numbers, self.starts,
            self.messages, self.answers, self.characters,
        )  # fmt: skip
        return Batch, (pickle.PickleBuffer(self.lines), *others)

    def __len__(self) -> int:
        """The number of conversations."""
        return len(self.ends)

    def conversation(self, index: int) -> Conversation:
        """One of the conversations once more; of a pair, the chosen one."""
        line = self.lines[self.ends[index - 1] if index else 0 : self.ends[index]]
        records = read_lines(io.BytesIO(line), "", REREAD.max_record_bytes, ProblemLog())
        data_format = "preference" if line.startswith(b'{"chosen"') else "messages"
        options = replace(REREAD, labels=line.startswith(b'{"label"'))
        return next(find_format(data_format).read(records, options, ProblemLog()))

    def count(self, indexes: Sequence[int]) -> SplitCount:
        """How much is in some of the conversations."""
        columns = (self.messages, self.answers, self.characters)
        return SplitCount(len(indexes), *(sum(map(column.__getitem__, indexes)) for column in columns))

    def blocks(self, indexes: Sequence[int]) -> Iterator[memoryview]:
        """The lines of some of the conversations, given in order; neighbors are one block."""
        view = memoryview(self.lines)
        if not indexes:
            return
        first = last = indexes[0]
        for index in indexes[1:]:
            if index != last + 1:
                yield view[self.ends[first - 1] if first else 0 : self.ends[last]]
                first = index
            last = index
        yield view[self.ends[first - 1] if first else 0 : self.ends[last]]


def batches(seed: int, most: int | None = None) -> Callable[[Iterable[Conversation | PlainRecord]], Iterator[Batch]]:
    """A function that makes batches of a stream of conversations.

    Args:
        seed: of the split.
        most: how many conversations a batch may have; by default, a mebibyte of them.
    """

    def make(conversations: Iterable[Conversation | PlainRecord]) -> Iterator[Batch]:
        pieces: list[bytes] = []
        entries: list[_Entry] = []
        end = 0
        for one in conversations:
            if isinstance(one, PlainRecord):
                said, rest = written_turns(one.turns), written_place(one.source)
                end += len(said) + len(rest)
                entries.append(_entry_of_plain(one, said, end, seed))
            else:
                said, rest = turns_text(one), columns_text(one)
                end += len(said) + len(rest)
                entries.append(_entry(one, said, end, seed))
            pieces += (said, rest)
            if end >= _BATCH_BYTES or len(entries) == most:
                yield _batch(pieces, entries)
                pieces, entries, end = [], [], 0
        if entries:
            yield _batch(pieces, entries)

    return make


_Entry = tuple[int, bytes, str, float, str, int, int, int]
"""What the lists of a batch have for one conversation, in their order."""


def _batch(pieces: Iterable[bytes], entries: Sequence[_Entry]) -> Batch:
    return Batch(b"".join(pieces), *map(list, zip(*entries, strict=True)))


def _entry(conversation: Conversation, said: bytes, end: int, seed: int) -> _Entry:
    """What must be known of a conversation.

    Args:
        conversation: the conversation.
        said: its turns and tools as they are written.
        end: where its line ends.
        seed: of the split.
    """
    digest = hashlib.sha256(said)
    if conversation.columns and (documents := conversation.columns.get("documents")) is not None:
        digest.update(repr(documents).encode(errors="surrogatepass"))
    first, answers, characters = None, 0, 0
    messages = conversation.messages
    for message in messages:
        role, content = message.role, message.content
        characters += len(content)
        if role == "assistant":
            answers += 1
        elif first is None and role == "user":
            first = content
    number, name = start_of_text(messages[0].content if first is None else first, seed)
    return end, digest.digest()[:16], conversation.source, number, name, len(messages), answers, characters


def _entry_of_plain(record: PlainRecord, said: bytes, end: int, seed: int) -> _Entry:
    """What `_entry` returns for the conversation that the record is."""
    turns = record.turns
    first = next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])
    number, name = start_of_text(first, seed)
    # Plain turns alternate, and the last is an answer.
    answers = (len(turns) + (turns[0]["role"] != "system")) // 2
    characters = sum([len(turn["content"]) for turn in turns])
    return end, hashlib.sha256(said).digest()[:16], record.source, number, name, len(turns), answers, characters
