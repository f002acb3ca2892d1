"""Near duplicates by MinHash and banding, with the signatures on disk.

Broder (1997) for MinHash; banding as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3. Runs of
five words and a similarity of 0.7 are what the dedup of The Stack uses (Kocetkov et al., 2022).
"""

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from peftchat.sources.stats.sightings import Sighting
from peftchat.sources.stats.words import Hashes, run_hashes

SIMILARITY = 0.7
"""From here on two dialogues count as nearly the same: Jaccard similarity of their runs of words."""
RUN = 5
_BANDS, _ROWS = 25, 5
_SIGNATURE = _BANDS * _ROWS
_SEED = 1
_NO_ROW = -1


def can_find_near_duplicates() -> bool:
    """Whether the MinHash library is installed (`pip install 'peftchat[hygiene]'`)."""
    return importlib.util.find_spec("rensa") is not None


class NearDuplicates:
    """Collects a signature of 500 bytes a dialogue on disk, and groups the dialogues that are nearly the same.

    With 25 bands of 5, a pair of similarity 0.7 is compared with a probability of 99 %; of 0.4, of 23 %.

    Args:
        folder: for two files; whoever gives it removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "signatures"
        self._signatures = self._path.open("wb")
        self._places = (folder / "places").open("w+", encoding="utf-8", errors="surrogateescape")
        self._offsets: list[int] = []
        self._parts: list[int] = []

    def add(self, dialogues: Sequence[tuple[Hashes, Sighting]]) -> None:
        """Take in dialogues: the hashes of their words, and where they stand. Empty ones are left out."""
        import rensa

        kept = [(_runs(words), sighting) for words, sighting in dialogues if len(words)]
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

    def groups(self) -> Iterator[list[Sighting]]:
        """Groups of two or more, each in the order in which they were added."""
        self._signatures.flush()
        count = len(self._parts)
        if not count:
            return
        signatures = np.memmap(self._path, dtype=np.uint32, mode="r", shape=(count, _SIGNATURE))
        leader = np.arange(count)
        for band in range(_BANDS):
            for first, second in _neighbours(signatures[:, band * _ROWS : (band + 1) * _ROWS]):
                one, other = _find(leader, first), _find(leader, second)
                if one != other and np.mean(signatures[first] == signatures[second]) >= SIMILARITY:
                    leader[max(one, other)] = min(one, other)
        members: defaultdict[int, list[int]] = defaultdict(list)
        roots = [_find(leader, number) for number in range(count)]
        sizes = Counter(roots)
        for number, root in enumerate(roots):
            if sizes[root] > 1:
                members[root].append(number)
        for numbers in members.values():
            yield [self._sighting(number) for number in numbers]

    def _sighting(self, number: int) -> Sighting:
        self._places.seek(self._offsets[number])
        return Sighting(self._parts[number], self._places.readline().rstrip("\n"))

    def close(self) -> None:
        """Let go of the files."""
        self._signatures.close()
        self._places.close()


def _runs(words: Hashes) -> Hashes:
    """The runs of a dialogue; one that is shorter than a run is one itself."""
    return run_hashes(words, min(RUN, len(words)))


def _neighbours(band: npt.NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Pairs of rows with equal values in this band: each row with the one that stands before it."""
    keys = _row_hashes(band)
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
