"""One pass over every part."""

import heapq
import itertools
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftchat.conversation import Conversation
from peftchat.conversations.languages import detect_language
from peftchat.conversations.problems import ProblemLog
from peftchat.conversations.splitting import conversation_fingerprint, fingerprint
from peftchat.conversations.stats.lengths import EXAMPLES, LengthSketch
from peftchat.conversations.stats.overlap import Benchmark, NearDuplicates, can_find_near_duplicates, word_hashes
from peftchat.conversations.stats.pairs import PairStats
from peftchat.conversations.stats.parts import FirstSeen, FirstSeenIndex, StatsPart
from peftchat.conversations.stats.result import (
    DataStats,
    LanguageCount,
    LongConversation,
    Overlap,
    PartStats,
    RoleCount,
)
from peftchat.errors import UserError

TokenCounter = Callable[[Sequence[str]], list[int]]
"""Texts -> tokens of each."""

_BATCH = 256
_LONGEST = 5
_LANGUAGE_SAMPLE = 1000
_FENCED = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)


def _no_progress(conversations: int) -> None:
    """Say nothing."""


def gather(
    parts: Sequence[StatsPart],
    benchmarks: Sequence[str] = (),
    *,
    count_tokens: TokenCounter | None = None,
    progress: Callable[[int], None] = _no_progress,
) -> DataStats:
    """Read every part once and describe it; bad rows are counted and passed over.

    Memory holds sketches only; what tells duplicates apart lies in a temporary folder, about 600 bytes a conversation.

    Args:
        parts: what to look at; overlaps are told for each pair.
        benchmarks: files with questions that training data should not hold.
        count_tokens: None leaves tokens out.
        progress: called with the number of conversations so far.

    Raises:
        UserError: a part or benchmark cannot be read at all.
    """
    started = time.monotonic()
    met = [Benchmark(path) for path in benchmarks]
    with tempfile.TemporaryDirectory(prefix="peftchat-stats-") as folder:
        repeats = _Repeats(Path(folder), parts)
        try:
            gathered = []
            seen = 0
            for number, part in enumerate(parts):
                gathering = _Gathering(part.name, number, count_tokens)
                log = ProblemLog()
                stream = part.read(log)
                while batch := list(itertools.islice(stream, _BATCH)):
                    gathering.add(batch)
                    repeats.add(batch, gathering.stats, number, met)
                    seen += len(batch)
                    progress(seen)
                gathered.append(gathering.finish(log))
            repeats.finish(gathered)
        finally:
            repeats.close()
    overlaps = [repeats.overlaps[pair] for pair in itertools.combinations(range(len(parts)), 2)]
    seconds = round(time.monotonic() - started, 3)
    return DataStats(gathered, overlaps, [benchmark.result() for benchmark in met], seconds)


@dataclass(slots=True)
class _Gathering:
    """The statistics of one part while it is read."""

    name: str
    number: int
    count_tokens: TokenCounter | None
    stats: PartStats = field(init=False)
    _longest: list[tuple[int, int, LongConversation]] = field(default_factory=list)
    _sample: list[Conversation] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.stats = PartStats(self.name)
        if self.count_tokens is not None:
            self.stats.tokens = LengthSketch()

    def add(self, batch: Sequence[Conversation]) -> None:
        """Count a batch of conversations."""
        for conversation, tokens in zip(batch, self._tokens(batch), strict=True):
            characters = self._count(conversation)
            if self.stats.tokens is not None and tokens is not None:
                self.stats.tokens.add(tokens)
            row = LongConversation(conversation.source, characters, tokens)
            size = characters if tokens is None else tokens
            # The running number decides between equals: rows themselves have no order.
            heapq.heappush(self._longest, (size, -self.stats.conversations, row))
            if len(self._longest) > _LONGEST:
                heapq.heappop(self._longest)
            self._take_sample(conversation)

    def _count(self, conversation: Conversation) -> int:
        stats = self.stats
        stats.conversations += 1
        stats.turns.add(len(conversation.messages))
        characters = code = 0
        for message in conversation.messages:
            role = stats.roles.setdefault(message.role, RoleCount())
            role.messages += 1
            role.characters += len(message.content)
            characters += len(message.content)
            if "```" in message.content or "~~~" in message.content:
                code += sum(len(match.group(2)) for match in _FENCED.finditer(message.content))
        if conversation.rejected is not None:
            stats.pairs = stats.pairs or PairStats()
            stats.pairs.add(conversation)
        if conversation.label is not None:
            stats.labels = stats.labels or {"good": 0, "bad": 0}
            stats.labels["good" if conversation.label else "bad"] += 1
        stats.characters.add(characters)
        stats.with_code += code > 0
        stats.code_characters += code
        return characters

    def _tokens(self, batch: Sequence[Conversation]) -> Sequence[int | None]:
        if self.count_tokens is None:
            return [None] * len(batch)
        counts = iter(self.count_tokens([message.content for one in batch for message in one.messages]))
        return [sum(itertools.islice(counts, len(one.messages))) for one in batch]

    def _take_sample(self, conversation: Conversation) -> None:
        """Keep each conversation with the same probability, without knowing how many there will be."""
        if len(self._sample) < _LANGUAGE_SAMPLE:
            self._sample.append(conversation)
        elif (place := self._random.randrange(self.stats.conversations)) < _LANGUAGE_SAMPLE:
            self._sample[place] = conversation

    def finish(self, log: ProblemLog) -> PartStats:
        """The statistics once all was read."""
        stats = self.stats
        stats.records = log.records
        stats.formats = dict(log.formats)
        stats.longest = tuple(row for _, _, row in sorted(self._longest, reverse=True))
        stats.problems = dict(log.problems)
        stats.problem_examples = {kind: list(map(str, problems)) for kind, problems in log.examples.items()}
        stats.skipped, stats.notes = dict(log.skipped), dict(log.notes)
        stats.unused = {name: f"{use.records} (first {use.first})" for name, use in log.unused.items()}
        stats.remarks = log.sentences()
        stats.languages = self._languages()
        return stats

    def _languages(self) -> LanguageCount | None:
        try:
            found = Counter(detect_language(one.messages) for one in self._sample)
        except UserError:
            return None
        return LanguageCount(len(self._sample), dict(found.most_common()))


class _Repeats:
    """Duplicates within parts and overlaps between them."""

    def __init__(self, folder: Path, parts: Sequence[StatsPart]) -> None:
        pairs = itertools.combinations(range(len(parts)), 2)
        self.overlaps = {(one, other): Overlap(parts[one].name, parts[other].name) for one, other in pairs}
        self._conversations = FirstSeenIndex(folder / "conversations")
        self._starts = FirstSeenIndex(folder / "starts")
        self._near = NearDuplicates(folder) if can_find_near_duplicates() else None

    def add(self, batch: Sequence[Conversation], stats: PartStats, part: int, benchmarks: Sequence[Benchmark]) -> None:
        """Compare a batch of conversations with all before it."""
        fresh = []
        for conversation in batch:
            is_new = self._compare(conversation, stats, part)
            # A pair is another one where either answer is.
            said = (*conversation.messages, *(conversation.rejected or ())[conversation.shared_turns :])
            text = "\n".join(message.content for message in said)
            if is_new and self._near is not None:
                fresh.append((word_hashes(text), FirstSeen(part, conversation.source)))
            if benchmarks:
                words = word_hashes(text, numerals=False)
                for benchmark in benchmarks:
                    benchmark.see(words, conversation.source)
        if self._near is not None:
            self._near.add(fresh)

    def _compare(self, conversation: Conversation, stats: PartStats, part: int) -> bool:
        """Count what the conversation repeats word for word; whether no other is the same."""
        place = conversation.source
        same = self._conversations.see(conversation_fingerprint(conversation), part, place)
        if part in same:
            stats.exact_duplicates += 1
            if len(stats.duplicate_examples) < EXAMPLES:
                stats.duplicate_examples.append((place, same[part]))
        for other in same.keys() - {part}:
            self.overlaps[other, part].same += 1
            self.overlaps[other, part].add_example(place, same[other])
        start = next((message for message in conversation.messages if message.role == "user"), None)
        started = self._starts.see(fingerprint([start]), part, place) if start is not None else {}
        for other in started.keys() - {part}:
            self.overlaps[other, part].same_start += 1
            if other not in same:
                self.overlaps[other, part].add_example(place, started[other])
        return not same

    def finish(self, parts: Sequence[PartStats]) -> None:
        """Count the near duplicates; to be called once, at the end."""
        if self._near is None:
            return
        for part in parts:
            part.near_duplicates = 0
        for overlap in self.overlaps.values():
            overlap.near = 0
        for group in self._near.groups():
            for place, member in enumerate(group):
                self._count_near(member, group[:place], parts[member.part])

    def _count_near(self, member: FirstSeen, earlier: Sequence[FirstSeen], stats: PartStats) -> None:
        own = next((other for other in earlier if other.part == member.part), None)
        if own is not None:
            assert stats.near_duplicates is not None
            stats.near_duplicates += 1
            if len(stats.near_examples) < EXAMPLES:
                stats.near_examples.append((member.where, own.where))
        for part in {other.part for other in earlier} - {member.part}:
            overlap = self.overlaps[part, member.part]
            assert overlap.near is not None
            overlap.near += 1
            overlap.add_example(member.where, next(other.where for other in earlier if other.part == part))

    def close(self) -> None:
        """Let go of the temporary files."""
        self._conversations.close()
        self._starts.close()
        if self._near is not None:
            self._near.close()
