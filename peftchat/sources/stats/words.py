"""Text as runs of words: the common ground of near duplicates and benchmark overlaps."""

import re
import zlib

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15  # odd, with its bits spread: 2**64 divided by the golden ratio


def word_hashes(text: str, *, numerals: bool = True) -> Hashes:
    """A number for each word, case and punctuation ignored: uint64, shape (W,). The same in every process.

    Args:
        text: any text.
        numerals: whether words of digits count; without them, two lists of primes have nothing in common.
    """
    words = _WORD.findall(text.lower())
    if not numerals:
        words = [word for word in words if not word.isdigit()]
    numbers = (zlib.crc32(word.encode(errors="surrogatepass")) for word in words)
    return np.fromiter(numbers, dtype=np.uint64, count=len(words))


def run_hashes(words: Hashes, length: int) -> Hashes:
    """A number for each run of `length` neighbouring words: uint64, shape (max(0, W - length + 1),)."""
    runs = len(words) - length + 1
    if runs <= 0:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(runs, dtype=np.uint64)
    base = np.uint64(_BASE)
    for place in range(length):
        # Arithmetic modulo 2**64, as in a polynomial rolling hash.
        total = total * base + words[place : place + runs]
    total ^= total >> np.uint64(32)
    return total * base
