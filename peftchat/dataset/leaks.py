"""Held-out conversations that are trained on as well: an evaluation that they take part in measures memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from peftchat.conversation import Conversation
from peftchat.conversations.splitting import fingerprint

_SHOWN = 3


@dataclass(slots=True)
class Leaks:
    """Held-out conversations, and which of them were met in training.

    Memory grows with the held-out conversations, about 150 bytes for each, and not with those trained on.

    Attributes:
        held_out: fingerprint -> how many held-out conversations have it, and the place of the first.
        met: fingerprint of those trained on -> the place where it was met first.
    """

    held_out: dict[bytes, tuple[int, str]] = field(default_factory=dict)
    met: dict[bytes, str] = field(default_factory=dict)

    @classmethod
    def of(cls, held_out: Iterable[Conversation]) -> "Leaks":
        """Take note of the held-out conversations."""
        leaks = cls()
        for conversation in held_out:
            mark = fingerprint(conversation.messages, conversation.tools)
            count, first = leaks.held_out.get(mark, (0, conversation.source))
            leaks.held_out[mark] = (count + 1, first)
        return leaks

    def watch(self, conversations: Iterator[Conversation]) -> Iterator[Conversation]:
        """Yield conversations to train on, and note those that are held out too."""
        if not self.held_out:
            yield from conversations
            return
        for conversation in conversations:
            mark = fingerprint(conversation.messages, conversation.tools)
            if mark in self.held_out:
                self.met.setdefault(mark, conversation.source)
            yield conversation

    def sentences(self) -> list[str]:
        """One sentence with count and first places, if there is any leak."""
        if not self.met:
            return []
        number = sum(self.held_out[mark][0] for mark in self.met)
        total = sum(count for count, _ in self.held_out.values())
        pairs = [f"{self.held_out[mark][1]} is {place}" for mark, place in list(self.met.items())[:_SHOWN]]
        more = ", …" if len(self.met) > _SHOWN else ""
        return [f"{number:,} of {total:,} eval conversations are also trained on ({', '.join(pairs)}{more})."]
