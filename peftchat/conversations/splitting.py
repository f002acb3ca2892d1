"""A short name for what a conversation says, for finding exact duplicates and for seeded choices."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peftchat.conversation import Conversation, Message


def conversation_fingerprint(conversation: Conversation) -> bytes:
    """16 bytes that are equal for conversations that say the same, and for no others.

    What counts is all of the turns (roles, contents, calls, reasoning, names, flags), the tools and the documents, not
    the other columns.
    """
    found = fingerprint(conversation.messages, conversation.tools, conversation.columns.get("documents"))
    if conversation.rejected is None:
        return found
    # A pair is another one where either answer is.
    return hashlib.blake2b(found + fingerprint(conversation.rejected), digest_size=16).digest()


def fingerprint(messages: Iterable[Message], tools: str | None = None, documents: object = None) -> bytes:
    """Return `conversation_fingerprint` of some of its messages."""
    parts: list[str] = []
    for message in messages:
        role, content, calls, *others = message
        # The length keeps two messages from reading like one.
        parts += (role, str(len(content)), content)
        if calls or others != _NOTHING:
            extra = repr(message[2:])
            parts += ("+", str(len(extra)), extra)
    if tools is not None:
        parts += ("tools", tools)
    if documents is not None:
        parts += ("documents", repr(documents))
    # One long text is encoded and hashed in half the time of its pieces.
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).digest()[:16]


_NOTHING = [None] * 4
"""What a plain message has behind its content and calls."""


FRACTION_STEP = 2.0**-48
"""The distance between neighboring values of `seeded_fraction`; all are exact floats."""


def seeded_fraction(seed: int | str, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone, uniform over keys."""
    text = f"{seed}\n{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) * FRACTION_STEP


_MOST_RELATIVES = 32
"""Records that may start alike and still be relatives, such as answers to one prompt, whatever their share."""
_SHARE_OF_FRACTION = 1 / 8
"""A group of relatives is at most this part of the held-out share; a larger one has a greeting in common."""
_COUNTERS_PER_GROUP = 4
_MOST_COUNTERS = 100_000
_LONGEST_NAME = 200
_SHOWN_OF_START = 60
_SHOWN_GREETINGS = 3


@dataclass(frozen=True, slots=True)
class EvalSplit:
    """The rule that puts a conversation on one side.

    All conversations that start with the same user message are on one side: that keeps the branches of an OpenAssistant
    tree together, and two trees that grew from the same words. Where a great many start alike, that is a greeting;
    then the start goes on to the next user message at which they differ, at last to the whole conversation.

    Attributes:
        fraction: the share of starts that goes to evaluation.
        seed: another seed is another choice.
        threshold: starts whose seeded number lies below it go to evaluation.
        greetings: starts that are too common to keep what follows them together.
        remarks: what a user should know about the split.
    """

    fraction: float
    seed: int
    threshold: float
    greetings: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()

    def is_eval(self, conversation: Conversation) -> bool:
        """Whether the conversation is held out."""
        return self.number(conversation) < self.threshold

    def number(self, conversation: Conversation) -> float:
        """The seeded number in [0, 1) of the conversation's start."""
        start = first_user_message(conversation)
        if self.greetings and _name(start) in self.greetings:
            for start in _longer_starts(conversation):
                if start not in self.greetings:
                    break
        return seeded_fraction(self.seed, start)


@dataclass(slots=True)
class _Counted:
    """A start that several records have.

    Attributes:
        record: the last of them.
        count: how many they are, or a little less.
        lowest: the lowest number of a longer start that begins with it.
        highest: the highest one.
    """

    record: str
    count: int = 2
    lowest: float = 1.0
    highest: float = 0.0


@dataclass(slots=True)
class SplitCensus:
    """Watches a stream of conversations and determines the split at its end, in constant memory.

    A threshold equal to the fraction can leave a side of a small set empty. The lowest and the highest number seen
    are enough to move it just so far that, given two different starts, neither side is.

    Starts that are common enough to matter are counted with a fixed number of counters (Misra and Gries, "Finding
    repeated elements", 1982): the count of a start is too low by a small part of what would make it a greeting.
    """

    fraction: float
    seed: int
    conversations: int = field(default=0, init=False)
    lowest: float = field(default=1.0, init=False)
    highest: float = field(default=0.0, init=False)
    # Most starts are seen once; of those the record alone is kept, which is half the work.
    _counted: dict[str, _Counted | str] = field(default_factory=dict, init=False)
    _counters: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.fraction:
            self._counters = min(_MOST_COUNTERS, _COUNTERS_PER_GROUP / (self.fraction * _SHARE_OF_FRACTION))

    @property
    def tentative(self) -> EvalSplit:
        """The split before anything was seen; final for all but small sets, and sets with a greeting."""
        return EvalSplit(self.fraction, self.seed, self.fraction)

    def see(self, conversation: Conversation) -> None:
        """Take note of a conversation."""
        number, name = start_of_text(first_user_message(conversation), self.seed)
        self.note([number], [name], [conversation.source], lambda _: conversation)

    def note(
        self,
        numbers: Sequence[float],
        names: Sequence[str],
        sources: Sequence[str],
        conversation: Callable[[int], Conversation],
    ) -> None:
        """Take note of conversations of which the starts are known.

        Args:
            numbers: for each, that of the tentative split (`start_of_text`).
            names: for each, that of its first user message.
            sources: their places.
            conversation: returns one of them, given its index; called where many start alike.
        """
        if not self.fraction or not numbers:
            return
        self.conversations += len(numbers)
        self.lowest = min(self.lowest, *numbers)
        self.highest = max(self.highest, *numbers)
        for index, (start, source) in enumerate(zip(names, sources, strict=True)):
            counted = self._count(start, source)
            if counted is not None and counted.count > _MOST_RELATIVES:
                name = start
                for name in _longer_starts(conversation(index)):
                    longer = self._count(name, source)
                    if longer is None or longer.count <= _MOST_RELATIVES:
                        break
                part = seeded_fraction(self.seed, name)
                counted.lowest = min(counted.lowest, part)
                counted.highest = max(counted.highest, part)

    def _count(self, start: str, record: str) -> _Counted | None:
        """Count a start, once for all conversations of one record: the branches of a tree are relatives."""
        counted = self._counted.get(start)
        if counted is None:
            if len(self._counted) >= self._counters:
                self._make_room()
            else:
                self._counted[start] = record
            return None
        if isinstance(counted, str):
            if counted == record and record:
                return None
            self._counted[start] = counted = _Counted(record)
        elif counted.record != record or not record:
            counted.count += 1
            counted.record = record
        return counted

    def _make_room(self) -> None:
        """Lower every count by one, and forget the starts that are left with none."""
        kept = {start: one for start, one in self._counted.items() if isinstance(one, _Counted)}
        for one in kept.values():
            one.count -= 1
        self._counted = {start: one for start, one in kept.items() if one.count}

    def final(self) -> EvalSplit:
        """The split for what was seen; if all conversations start alike and cannot be told apart, none is held out."""
        if not self.fraction or not self.conversations:
            return replace(self.tentative, threshold=0.0)
        limit = max(_MOST_RELATIVES, self.conversations * self.fraction * _SHARE_OF_FRACTION)
        common = {start: one for start, one in self._counted.items() if isinstance(one, _Counted) and one.count > limit}
        greetings = {start: one for start, one in common.items() if one.lowest < one.highest}
        lowest, highest = self.lowest, self.highest
        if greetings:
            lowest = min(one.lowest for one in greetings.values())
            highest = max(one.highest for one in greetings.values())
        if lowest >= highest:
            return replace(self.tentative, threshold=0.0, remarks=(self._nothing_held_out(),))
        longer = {start for start in common if start.startswith(_LONGER)} if greetings else set()
        return replace(
            self.tentative,
            threshold=min(max(self.fraction, lowest + FRACTION_STEP), highest),
            greetings=frozenset(greetings.keys() | longer),
            remarks=tuple(self._remarks(greetings)),
        )

    def _nothing_held_out(self) -> str:
        return (
            f"No conversation is held out: all {self.conversations:,} start with the same user message, and those "
            "that start alike stay together."
        )

    def _remarks(self, greetings: Mapping[str, _Counted]) -> Iterator[str]:
        for start, one in sorted(greetings.items(), key=lambda entry: -entry[1].count)[:_SHOWN_GREETINGS]:
            yield (
                f"{one.count / self.conversations:.0%} of the conversations start with {_shown(start)!r}: "
                "the eval split keeps only those together that also go on alike."
            )


def fit_split(conversations: Iterable[Conversation], fraction: float, seed: int) -> EvalSplit:
    """The split of a set that can be read twice: once here, once by `is_eval`."""
    census = SplitCensus(fraction, seed)
    for conversation in conversations:
        census.see(conversation)
    return census.final()


def first_user_message(conversation: Conversation) -> str:
    """The content of the first user message, of the first message where there is none."""
    for message in conversation.messages:
        if message.role == "user":
            return message.content
    return conversation.messages[0].content


def start_of_text(start: str, seed: int) -> tuple[float, str]:
    """What a census must know of a first user message: its number in the tentative split, in [0, 1), and its name."""
    return seeded_fraction(seed, start), _name(start)


_LONGER = "\0longer "
"""What the name of a longer start begins with; no message holds the character NUL."""


def _longer_starts(conversation: Conversation) -> Iterator[str]:
    """Names of the conversation's starts up to its second user message, its third, and so on; at last of all of it."""
    users = [number for number, message in enumerate(conversation.messages) if message.role == "user"]
    for number in users[1:]:
        yield _LONGER + fingerprint(conversation.messages[: number + 1]).hex()
    yield _LONGER + fingerprint(conversation.messages).hex()


def _name(start: str) -> str:
    """The start itself, or what tells a long one apart: counters must not hold whole texts."""
    if len(start) <= _LONGEST_NAME:
        return start
    digest = hashlib.blake2b(start.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return f"{start[:_LONGEST_NAME]}\0{digest}"


def _shown(name: str) -> str:
    text, _, rest = name.partition("\0")
    line = " ".join(text.split())
    return f"{line[:_SHOWN_OF_START]}…" if rest or len(line) > _SHOWN_OF_START else line
