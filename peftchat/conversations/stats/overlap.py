"""Text as runs of words: the common ground of near duplicates and benchmark overlaps."""

import importlib.util
import os
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from peftchat.conversations.problems import MAX_RECORD_BYTES, ProblemLog
from peftchat.conversations.readers import find_files, reader_for
from peftchat.conversations.stats.parts import FirstSeen
from peftchat.conversations.stats.result import EXAMPLES, BenchmarkOverlap
from peftchat.errors import UserError

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
    """A number for each run of `length` neighboring words: uint64, shape (max(0, W - length + 1),)."""
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


SIMILARITY = 0.7
"""From here on two conversations count as nearly the same: Jaccard similarity of their runs of words."""
RUN = 5
_BANDS, _ROWS = 25, 5
_SIGNATURE = _BANDS * _ROWS
_SEED = 1
_PIECE = 4096
"""Rows of signatures that are read at once."""
_NO_ROW = -1


def can_find_near_duplicates() -> bool:
    """Whether the MinHash library is installed (`pip install 'peftchat[hygiene]'`)."""
    return importlib.util.find_spec("rensa") is not None


class NearDuplicates:
    """Collects a signature of 500 bytes a conversation on disk, and groups the conversations that are nearly the same.

    With 25 bands of 5, a pair of similarity 0.7 is compared with a probability of 99 %; of 0.4, of 23 %.

    Args:
        folder: for two files; whoever gives it removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "signatures"
        self._signatures = self._path.open("wb")
        self._places = (folder / "places").open("w+", encoding="utf-8", errors="surrogateescape")
        self._offsets = array("q")
        self._parts = array("l")

    def add(self, conversations: Sequence[tuple[Hashes, FirstSeen]]) -> None:
        """Take in conversations: the hashes of their words, and where they stand. Empty ones are left out."""
        import rensa

        kept = [(_runs(words), sighting) for words, sighting in conversations if len(words)]
        if not kept:
            return
        offsets = np.cumsum([0, *(len(runs) for runs, _ in kept)]).astype(np.uint64)
        digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate([runs for runs, _ in kept]), offsets, _SIGNATURE, _SEED
        )
        self._signatures.write(np.array(digests.to_rows(), dtype=np.uint32).tobytes())
        for _, sighting in kept:
            self._offsets.append(self._places.tell())
            self._places.write(sighting.where + "\n")
            self._parts.append(sighting.part)

    def groups(self) -> Iterator[list[FirstSeen]]:
        """Groups of two or more, each in the order in which they were added."""
        self._signatures.flush()
        count = len(self._parts)
        if not count:
            return
        leader = np.arange(count)
        with self._path.open("rb") as signatures:
            for band in range(_BANDS):
                for first, second in _neighbors(_band_keys(signatures, band, count)):
                    one, other = _find(leader, first), _find(leader, second)
                    if one != other and _similarity(signatures, first, second) >= SIMILARITY:
                        leader[max(one, other)] = min(one, other)
        members: defaultdict[int, list[int]] = defaultdict(list)
        roots = np.fromiter((_find(leader, number) for number in range(count)), dtype=np.int64, count=count)
        for number in np.flatnonzero(np.bincount(roots, minlength=count)[roots] > 1).tolist():
            members[int(roots[number])].append(number)
        for numbers in members.values():
            yield [self._sighting(number) for number in numbers]

    def _sighting(self, number: int) -> FirstSeen:
        self._places.seek(self._offsets[number])
        return FirstSeen(self._parts[number], self._places.readline().rstrip("\n"))

    def close(self) -> None:
        """Let go of the files."""
        self._signatures.close()
        self._places.close()


def _runs(words: Hashes) -> Hashes:
    """The runs of a conversation; one that is shorter than a run is one itself."""
    return run_hashes(words, min(RUN, len(words)))


def _band_keys(signatures: BinaryIO, band: int, count: int) -> Hashes:
    """A number for each row by its values in this band: uint64, shape (count,).

    The file is read in pieces, because the pages of a mapped file count as memory of the process.
    """
    keys = np.empty(count, dtype=np.uint64)
    signatures.seek(0)
    for start in range(0, count, _PIECE):
        rows = np.fromfile(signatures, dtype=np.uint32, count=_PIECE * _SIGNATURE).reshape(-1, _SIGNATURE)
        keys[start : start + len(rows)] = _row_hashes(rows[:, band * _ROWS : (band + 1) * _ROWS])
    return keys


def _similarity(signatures: BinaryIO, first: int, second: int) -> float:
    """The share of equal values in two signatures."""
    one, other = (_signature(signatures, number) for number in (first, second))
    return float(np.mean(one == other))


def _signature(signatures: BinaryIO, number: int) -> npt.NDArray[np.uint32]:
    size = _SIGNATURE * np.dtype(np.uint32).itemsize
    return np.frombuffer(os.pread(signatures.fileno(), size, number * size), dtype=np.uint32)


def _neighbors(keys: Hashes) -> Iterator[tuple[int, int]]:
    """Pairs of rows with equal keys: each row with the one that stands before it."""
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    for place in equal:
        yield int(order[place]), int(order[place + 1])


def _row_hashes(band: npt.NDArray[np.uint32]) -> Hashes:
    """A number for each row: uint64, shape (N,)."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in range(band.shape[1]):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + band[:, column]
        keys ^= keys >> np.uint64(29)
    return keys


def _find(leader: npt.NDArray[np.int64], number: int) -> int:
    """The first row of the group that a row is in, so far."""
    while leader[number] != number:
        leader[number] = leader[leader[number]]
        number = int(leader[number])
    return number


BENCHMARK_RUN = 13
"""Words in a run."""
_SHORTEST = 8
_COMMON = 10


class Benchmark:
    """The questions of one benchmark file, and which of them were met.

    Args:
        path: a file or folder in any form of rows; every text field of a row counts as part of its question.

    Raises:
        UserError: the file cannot be read, or no text in it has eight words.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._found: set[int] = set()
        self._conversations = 0
        self._examples: list[tuple[str, str]] = []
        self._places: list[str] = []
        runs: dict[int, dict[int, set[int]]] = {}
        for number, (where, fields) in enumerate(_records(path)):
            self._places.append(where)
            for text in _texts(fields):
                words = word_hashes(text, numerals=False)
                length = min(BENCHMARK_RUN, len(words))
                if length >= _SHORTEST:
                    for value in run_hashes(words, length).tolist():
                        runs.setdefault(length, {}).setdefault(value, set()).add(number)
        self._runs = {length: _Table(table) for length, table in runs.items()}
        if not self._runs:
            raise UserError(
                f"no text in it has {_SHORTEST} words", where=path, hint="Give a file with whole questions."
            )

    def see(self, words: Hashes, where: str) -> None:
        """Compare a conversation: the hashes of its words without numerals, and its place."""
        met: set[int] = set()
        for length, table in self._runs.items():
            met |= table.questions(run_hashes(words, length))
        if met:
            self._conversations += 1
            self._found |= met
            if len(self._examples) < EXAMPLES:
                self._examples.append((where, self._places[min(met)]))

    def result(self) -> BenchmarkOverlap:
        """What was met so far."""
        return BenchmarkOverlap(
            self._path, len(self._places), len(self._found), self._conversations, tuple(self._examples)
        )


class _Table:
    """Runs of one length, sorted, each with the questions that hold it."""

    def __init__(self, runs: Mapping[int, set[int]]) -> None:
        rare = sorted((value, numbers) for value, numbers in runs.items() if len(numbers) <= _COMMON)
        self._values = np.array([value for value, _ in rare], dtype=np.uint64)
        self._questions = [numbers for _, numbers in rare]

    def questions(self, runs: Hashes) -> set[int]:
        """The numbers of the questions that share a run."""
        if not len(self._values) or not len(runs):
            return set()
        places = np.minimum(np.searchsorted(self._values, runs), len(self._values) - 1)
        hits = places[self._values[places] == runs]
        return {number for place in hits.tolist() for number in self._questions[place]}


def _records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    files = find_files(path)
    if files is None:
        raise UserError("a benchmark is a file or a folder of files", where=path, hint="Download it first.")
    for file in files:
        reader = reader_for(Path(file))
        if reader is None:
            continue
        log = ProblemLog()
        for row in reader(Path(file), MAX_RECORD_BYTES, log):
            yield row.where, row.value
        if log.first is not None:
            raise UserError(f"a row of the benchmark cannot be read: {log.first.detail}", where=log.first.where)


def _texts(value: object) -> Iterator[str]:
    """Every text in a row, however deep."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
