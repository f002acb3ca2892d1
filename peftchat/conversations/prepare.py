"""A folder that appears whole or not at all, and the files in it."""

import itertools
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import orjson

from peftchat.conversation import Conversation
from peftchat.conversations.dataset_card import SKIPPED, Card, SplitCount, card_text
from peftchat.conversations.messages_file import ConversationFile
from peftchat.conversations.problems import KINDS, Problem, ProblemLog, ReadOptions
from peftchat.conversations.reading import read_and_make, read_conversations
from peftchat.conversations.splitting import EvalSplit, SplitCensus
from peftchat.conversations.written_batches import REREAD, Batch, batches
from peftchat.errors import UserError, VerificationError
from peftchat.output_paths import InputPath, check_output, free_name

_KEPT_OF_RAW_RECORD = 64 * 1024


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder` that takes its name if the block ends well, and goes if it does not.

    Raises:
        UserError: `folder` is a file or holds something, or the disk does not let us write.
    """
    hint = "Give a folder that does not exist yet, or an empty one."
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError("the output folder is not empty", where=str(folder), hint=hint)
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is a file, not a folder", where=str(folder), hint=hint)
    draft = free_name(folder.with_name(f".{folder.name}.{os.getpid()}"), "partial")
    made = [parent for parent in draft.parents if not parent.exists()]
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write here: {error.strerror or error}", where=str(folder)) from error
    except sqlite3.Error as error:
        raise UserError(f"cannot write here: {error}", where=str(folder)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: it holds the result
                parent.rmdir()


class Quarantine:
    """The bad records, each with its place and reason; the file is made with the first of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def write(self, problem: Problem, raw: bytes | None) -> None:
        """Append one record; of a very long one only the start is kept, and said to be."""
        if self._file is None:
            self._file = self._path.open("wb")
        text = (raw or b"")[:_KEPT_OF_RAW_RECORD].decode(errors="backslashreplace")
        record = {
            "where": problem.where,
            "kind": problem.kind,
            "detail": printable(problem.detail),
            "row": text,
            # Of a record above the limit the reader has the start alone.
            "cut": problem.kind == "record_too_long" or len(raw or b"") > _KEPT_OF_RAW_RECORD,
        }
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def printable(text: str) -> str:
    """The text with halves of surrogate pairs spelt out, so that any file or terminal takes it."""
    return text.encode(errors="backslashreplace").decode()


_IN_MEMORY = 2**18
_CACHE_KIB = 16 * 1024


class FingerprintSet:
    """A set of fingerprints whose memory is bounded: the first ones are in memory, the others on disk.

    A quarter of a million take 25 MB, and the page cache of the others at most 16 MB.

    Args:
        file: where to keep the others; removed at the end.
        most: how many are in memory.
    """

    def __init__(self, file: Path, most: int = _IN_MEMORY) -> None:
        self._file = file
        self._most = most
        self._first: set[bytes] = set()
        self._base: sqlite3.Connection | None = None

    def add(self, fingerprints: Sequence[bytes]) -> list[int]:
        """Remember fingerprints; return the indexes of those that are new and not there twice."""
        first, others = self._first, self._insert
        new = []
        for index, fingerprint in enumerate(fingerprints):
            if fingerprint in first:
                continue
            if len(first) < self._most:
                first.add(fingerprint)
            elif not others(fingerprint):
                continue
            new.append(index)
        return new

    def _insert(self, fingerprint: bytes) -> bool:
        """Remember a fingerprint on disk; return whether it was new there."""
        if self._base is None:
            self._base = sqlite3.connect(self._file, isolation_level=None)
            self._base.execute("PRAGMA journal_mode = OFF")
            self._base.execute("PRAGMA synchronous = OFF")
            self._base.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._base.execute("CREATE TABLE seen (fingerprint BLOB PRIMARY KEY) WITHOUT ROWID")
            self._base.execute("BEGIN")
        return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (fingerprint,)).rowcount > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._base is not None:
            self._base.close()
        self._file.unlink(missing_ok=True)


_TRAIN, _EVAL = "train.jsonl", "eval.jsonl"


@dataclass(frozen=True, slots=True)
class PrepareOptions(ReadOptions):
    """How to read a source and what to make of it.

    Attributes:
        format: input format, or `auto`.
        split: of a folder or hub data set.
        subset: of a hub data set that has several.
        revision: branch, tag or commit of a hub data set.
        eval_fraction: share of first user messages whose conversations are held out.
        seed: of that choice.
        strict: end at the first problem.
        max_samples: stop after this many.
        keep_going: write what was read although the rest of a file could not be.
    """

    format: str = "auto"
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    eval_fraction: float = 0.1
    seed: int = 0
    strict: bool = False
    max_samples: int | None = None
    keep_going: bool = False


def _no_progress(conversations: int) -> None:
    """Say nothing."""


def prepare(
    source: str, folder: Path, settings: PrepareOptions, progress: Callable[[int], None] = _no_progress
) -> Card:
    """Write `train.jsonl`, `eval.jsonl`, `card.md`, `card.json` and, if any record is bad, `quarantine.jsonl`.

    Exact duplicates are left out. Memory does not grow with the source. Everything is written beside `folder` first
    and renamed at the end.

    Args:
        source: a file, a folder or a hub id.
        folder: absent or empty.
        settings: what to make of the source.
        progress: called with the number of conversations seen so far.

    Raises:
        UserError: as `read_conversations`; or `folder` is not empty or cannot be written, or no conversation is left.
        VerificationError: the rest of a file could not be read; nothing is written.
    """
    started = time.monotonic()
    check_output(folder, [InputPath(Path(source), "the source", is_read_recursively=True)], str(folder))
    card = Card(source, asdict(settings), version("peftchat"))
    with atomic_directory(folder) as draft:
        with Quarantine(draft / "quarantine.jsonl") as quarantine:
            log = ProblemLog(strict=settings.strict, quarantine=quarantine.write)
            new = _new_only(_batches(source, settings, log, card), draft, log, progress)
            split = _write_splits(new, draft, settings, card)
        card.take(log)
        bad = draft / "quarantine.jsonl"
        if log.problems["broken_file"] and not settings.keep_going:
            raise VerificationError(_broken_files(log) + _kept_beside(bad, folder))
        if not card.train.conversations + card.eval.conversations:
            raise UserError(
                "no conversation is left", where=source, hint=_why_nothing(card) + _kept_beside(bad, folder)
            )
        if split is not None:
            _split_again(draft, split, card, settings)
        card.seconds = round(time.monotonic() - started, 3)
        (draft / "card.md").write_text(card_text(card), encoding="utf-8")
        (draft / "card.json").write_bytes(orjson.dumps(card.as_dict(), option=orjson.OPT_INDENT_2))
    return card


def _broken_files(log: ProblemLog) -> str:
    """Which files were not read to their end, and what to do."""
    first, *others = log.examples["broken_file"]
    more = log.problems["broken_file"] - 1
    what = first.detail
    if more:
        what += f"; {more:,} more file{'s' if more > 1 else ''} cannot be read to the end"
        what += f": {', '.join(other.where for other in others)}"
    hint = "Repair the file or fetch it again, or pass --keep-going to keep what was read."
    return f"{first.where}: {what}. No data was written. {hint}"


def _kept_beside(bad: Path, folder: Path) -> str:
    """Move the bad records beside a folder that will not be there, and say where they are.

    Args:
        bad: the quarantine in the draft of the folder.
        folder: the output.
    """
    if not bad.exists():
        return ""
    kept = folder.with_name(f"{folder.name}-quarantine.jsonl")
    if os.path.lexists(kept) and not _is_quarantine(kept):
        kept = free_name(kept.with_suffix(""), "new.jsonl")
    bad.rename(kept)
    return f" All bad records are in {kept}."


def _batches(source: str, settings: PrepareOptions, log: ProblemLog, card: Card) -> Iterator[Batch]:
    limit = settings.max_samples
    stream = read_and_make(
        source,
        batches(settings.seed, None if limit is None else 1),
        format=settings.format,
        split=settings.split,
        subset=settings.subset,
        revision=settings.revision,
        problems=log,
        options=settings,
        in_parts=limit is None,
        takes_plain=True,
    )
    yield from itertools.islice(stream, limit)
    card.stopped_early = next(stream, None) is not None


def _new_only(
    stream: Iterator[Batch], draft: Path, log: ProblemLog, progress: Callable[[int], None]
) -> Iterator[tuple[Batch, list[int]]]:
    """The batches, each with the indexes of the conversations that were not there before."""
    number = 0
    with FingerprintSet(draft / ".seen") as seen:
        for batch in stream:
            number += len(batch)
            progress(number)
            new = seen.add(batch.fingerprints)
            if len(new) < len(batch):
                log.skipped["duplicate"] += len(batch) - len(new)
            yield batch, new


def _write_splits(
    stream: Iterator[tuple[Batch, list[int]]], draft: Path, settings: PrepareOptions, card: Card
) -> EvalSplit | None:
    """Write both files by the split that most sets end with; return another if the set turns out to need it."""
    census = SplitCensus(settings.eval_fraction, settings.seed)
    limit = census.tentative.threshold
    with ConversationFile(draft / _TRAIN, card.train) as train, ConversationFile(draft / _EVAL, card.eval) as held_out:
        for batch, new in stream:
            numbers = [batch.numbers[index] for index in new]
            starts = [batch.starts[index] for index in new]
            sources = [batch.sources[index] for index in new]
            census.note(numbers, starts, sources, partial(_one_of, batch, new))
            for file, held in ((train, False), (held_out, True)):
                chosen = [index for index, number in zip(new, numbers, strict=True) if (number < limit) is held]
                file.write_lines(batch.blocks(chosen), batch.count(chosen))
    final = census.final()
    card.remarks += final.remarks
    return None if final == census.tentative else final


def _one_of(batch: Batch, indexes: Sequence[int], place: int) -> Conversation:
    return batch.conversation(indexes[place])


def _split_again(draft: Path, split: EvalSplit, card: Card, settings: PrepareOptions) -> None:
    """Divide the conversations of both files by another split."""
    whole = []
    for name in (_TRAIN, _EVAL):
        whole.append((draft / name).rename(draft / f".whole.{name}"))
    card.train, card.eval = SplitCount(), SplitCount()
    with ConversationFile(draft / _TRAIN, card.train) as train, ConversationFile(draft / _EVAL, card.eval) as held_out:
        for path in whole:
            for conversation in _reread(path, settings) if path.stat().st_size else ():
                (held_out if split.is_eval(conversation) else train).write(conversation)
            path.unlink()


def _reread(path: Path, settings: PrepareOptions) -> Iterator[Conversation]:
    data_format = "preference" if settings.pairs else "messages"
    options = replace(REREAD, pairs=settings.pairs, labels=settings.labels)
    for conversation in read_conversations(path, format=data_format, problems=ProblemLog(), options=options):
        # Its place is the column `source` of the file.
        columns = dict(conversation.columns)
        yield replace(conversation, source=str(columns.get("source", "")), columns=columns)


def _is_quarantine(path: Path) -> bool:
    """Whether a file is what an earlier preparation left here, which may be replaced."""
    start = b'{"where":'
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _why_nothing(card: Card) -> str:
    """What became of the records, with the first example of each kind: its place, the value, what is known."""
    reasons = [f"{count:,} {KINDS[kind]} ({card.examples[kind][0]})" for kind, count in card.problems.items()]
    reasons += [f"{count:,} {SKIPPED[rule]}" for rule, count in card.skipped.items()]
    return f"Of {card.records:,} records: {'; '.join(reasons) or 'none was left out'}."


__all__ = ["Card", "PrepareOptions", "card_text", "prepare"]
