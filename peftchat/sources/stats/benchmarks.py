"""Overlap with benchmark questions: runs of words that occur in both.

Thirteen words, shorter texts of eight words and more as a whole, and runs that occur in more than ten questions
ignored: the rules by which GPT-3 looked for contamination (Brown et al., 2020, appendix C). Words of digits are left
out on both sides: everybody's list of primes begins in the same way.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftchat.errors import UserError
from peftchat.sources.problems import ProblemLog
from peftchat.sources.readers import find_files, reader_for
from peftchat.sources.row import MAX_ROW_BYTES
from peftchat.sources.stats.result import EXAMPLES, BenchmarkOverlap
from peftchat.sources.stats.words import Hashes, run_hashes, word_hashes

RUN = 13
"""Words in a run."""
_SHORTEST = 8
_COMMON = 10


class Benchmark:
    """The questions of one benchmark file, and which of them were met.

    Args:
        path: a file or folder in any form of rows; every text field of a row counts as part of its question.

    Raises:
        InputError: the file cannot be read, or no text in it has eight words.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._found: set[int] = set()
        self._dialogues = 0
        self._examples: list[tuple[str, str]] = []
        self._places: list[str] = []
        runs: dict[int, dict[int, set[int]]] = {}
        for number, (where, fields) in enumerate(_rows(path)):
            self._places.append(where)
            for text in _texts(fields):
                words = word_hashes(text, numerals=False)
                length = min(RUN, len(words))
                if length >= _SHORTEST:
                    for value in run_hashes(words, length).tolist():
                        runs.setdefault(length, {}).setdefault(value, set()).add(number)
        self._runs = {length: _Table(table) for length, table in runs.items()}
        if not self._runs:
            raise UserError(
                f"no text in it has {_SHORTEST} words", where=path, cure="Give a file with whole questions."
            )

    def see(self, words: Hashes, where: str) -> None:
        """Compare a dialogue: the hashes of its words without numerals, and its place."""
        met: set[int] = set()
        for length, table in self._runs.items():
            met |= table.questions(run_hashes(words, length))
        if met:
            self._dialogues += 1
            self._found |= met
            if len(self._examples) < EXAMPLES:
                self._examples.append((where, self._places[min(met)]))

    def result(self) -> BenchmarkOverlap:
        """What was met so far."""
        return BenchmarkOverlap(self._path, len(self._places), len(self._found), self._dialogues, tuple(self._examples))


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


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    files = find_files(path)
    if files is None:
        raise UserError("a benchmark is a file or a folder of files", where=path, cure="Download it first.")
    for file in files:
        reader = reader_for(Path(file))
        if reader is None:
            continue
        log = ProblemLog()
        for row in reader(Path(file), MAX_ROW_BYTES, log):
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
