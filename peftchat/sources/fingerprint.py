"""A short name for what a dialogue says, for finding exact duplicates and for seeded choices."""

import hashlib
from collections.abc import Iterable

from peftchat.conversation import Message


def fingerprint(messages: Iterable[Message]) -> bytes:
    """16 bytes that are equal for dialogues with the same roles and the same contents, and for no others."""
    state = hashlib.blake2b(digest_size=16)
    for message in messages:
        content = message.content.encode(errors="surrogatepass")
        # The length keeps two messages from reading like one.
        state.update(b"%s %d\n" % (message.role.encode(), len(content)))
        state.update(content)
    return state.digest()


STEP = 2.0**-48
"""The distance between neighbouring values of `seeded_fraction`; all are exact floats."""


def seeded_fraction(seed: int | str, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone, uniform over keys."""
    text = f"{seed}\n{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) * STEP
