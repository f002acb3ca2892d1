"""A short name for what a conversation says, for finding exact duplicates and for seeded choices."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from peftchat.conversation import Conversation, Message


def fingerprint(messages: Iterable[Message], tools: str | None = None) -> bytes:
    """16 bytes that are equal for conversations that say the same, and for no others.

    What counts is all of the turns (roles, contents, calls, reasoning, names, flags) and the tools, not the columns.
    """
    state = hashlib.blake2b(digest_size=16)
    for message in messages:
        content = message.content.encode(errors="surrogatepass")
        # The length keeps two messages from reading like one.
        state.update(b"%s %d\n" % (message.role.encode(), len(content)))
        state.update(content)
        if not message.is_plain:
            extra = repr(message[2:]).encode(errors="surrogatepass")
            state.update(b"+ %d\n" % len(extra) + extra)
    if tools is not None:
        state.update(b"tools\n" + tools.encode(errors="surrogatepass"))
    return state.digest()


FRACTION_STEP = 2.0**-48
"""The distance between neighboring values of `seeded_fraction`; all are exact floats."""


def seeded_fraction(seed: int | str, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone, uniform over keys."""
    text = f"{seed}\n{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) * FRACTION_STEP


@dataclass(frozen=True, slots=True)
class EvalSplit:
    """The rule that puts a conversation on one side.

    All conversations that start with the same user message are on one side: that keeps the branches of an OpenAssistant
    tree together, and two trees that grew from the same words.

    Attributes:
        fraction: the share of first messages that goes to evaluation.
        seed: another seed is another choice.
        threshold: first messages whose seeded number lies below it go to evaluation.
    """

    fraction: float
    seed: int
    threshold: float

    def is_eval(self, conversation: Conversation) -> bool:
        """Whether the conversation is held out."""
        return self.number(conversation) < self.threshold

    def number(self, conversation: Conversation) -> float:
        """The seeded number in [0, 1) of the conversation's first user message."""
        return seeded_fraction(self.seed, _start(conversation))


@dataclass(slots=True)
class SplitCensus:
    """Watches a stream of conversations and settles the split at its end, in constant memory.

    A threshold equal to the fraction can leave a side of a small set empty. The lowest and the highest number seen
    are enough to move it just so far that, given two different first messages, neither side is.
    """

    fraction: float
    seed: int
    lowest: float = field(default=1.0, init=False)
    highest: float = field(default=0.0, init=False)

    @property
    def tentative(self) -> EvalSplit:
        """The split before anything was seen; final for all but small sets."""
        return EvalSplit(self.fraction, self.seed, self.fraction)

    def see(self, number: float) -> None:
        """Take note of a conversation's number."""
        self.lowest = min(self.lowest, number)
        self.highest = max(self.highest, number)

    def settle(self) -> EvalSplit:
        """The split for what was seen; with a single first message all of it is training data."""
        if not self.fraction or self.lowest >= self.highest:
            return replace(self.tentative, threshold=0.0)
        threshold = min(max(self.fraction, self.lowest + FRACTION_STEP), self.highest)
        return replace(self.tentative, threshold=threshold)


def fit_split(conversations: Iterable[Conversation], fraction: float, seed: int) -> EvalSplit:
    """The split of a set that can be read twice: once here, once by `is_eval`."""
    census = SplitCensus(fraction, seed)
    for conversation in conversations:
        census.see(census.tentative.number(conversation))
    return census.settle()


def _start(conversation: Conversation) -> str:
    for message in conversation.messages:
        if message.role == "user":
            return message.content
    return conversation.messages[0].content
