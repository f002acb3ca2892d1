"""Which spans of a text its tokens cover, by the bytes of the tokens or by the offsets of the `tokenizers` library."""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenBytes(dict[int, bytes]):
    """The bytes that each id of a byte-level tokenizer stands for, found when first asked; b"" where that is not sure.

    Each byte is spelled as a printable character.
    https://github.com/openai/gpt-2/blob/master/src/encoder.py (bytes_to_unicode)
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._of_character = {chr(byte): byte for byte in printable}
        self._of_character |= {chr(256 + number): byte for number, byte in enumerate(others)}

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._added:
            found = token.encode("utf-8", "surrogatepass")
        elif all(character in self._of_character for character in token):
            found = bytes(self._of_character[character] for character in token)
        else:
            found = b""
        self[token_id] = found
        return found


def covered_by_bytes(spans: Sequence[str], text: str, pieces: Sequence[bytes]) -> list[tuple[int, int]] | None:
    """Return the first and the last span that each token covers; None where the tokens do not spell the text.

    Args:
        spans: the text in spans.
        text: the same as one.
        pieces: the bytes of each token.
    """
    if b"".join(pieces) != text.encode("utf-8", "surrogatepass") or not all(pieces):
        return None
    stops = list(itertools.accumulate(map(len, pieces)))
    borders = list(itertools.accumulate(len(span.encode("utf-8", "surrogatepass")) for span in spans[:-1]))
    first: list[int] = []
    last: list[int] = []
    for number, border in enumerate(borders):
        # Tokens that start before the border, and those that end at it or before.
        first += [number] * (min(bisect_left(stops, border) + 1 if border else 0, len(pieces)) - len(first))
        last += [number] * (bisect_right(stops, border) - len(last))
    first += [len(borders)] * (len(pieces) - len(first))
    last += [len(borders)] * (len(pieces) - len(last))
    return list(zip(first, last, strict=True))


def covered(spans: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first and the last span that each token covers.

    Args:
        spans: the text in spans.
        offsets: for each token its first character and one past its last.
    """
    if not offsets:
        return []
    ends = np.cumsum([len(span) for span in spans])
    places = np.array(offsets)
    starts, stops = places[:, 0], np.maximum(places[:, 1] - 1, places[:, 0])
    last = ends[-1] - 1
    first, final = (np.searchsorted(ends, np.minimum(at, last), side="right").tolist() for at in (starts, stops))
    return list(zip(first, final, strict=True))
