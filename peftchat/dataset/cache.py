"""Dataset cache: a recipe's encoded examples on disk, built once and memory-mapped by every process.

The cache key covers the content of the sources and every setting that changes the examples. The first process builds
the examples under a lock; every other one, in this run or another, maps the finished file.
"""

import errno
import gc
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.chat_template.examples import EncodedExample, ExampleStore, ExampleWriter
from peftchat.conversation import Conversation
from peftchat.conversations import ProblemLog
from peftchat.conversations.readers import find_files
from peftchat.conversations.reading import read_numbered
from peftchat.conversations.splitting import fit_split
from peftchat.dataset.digests import tokenizer_digest
from peftchat.dataset.encode import EncodingStats, encode_conversations
from peftchat.dataset.leaks import Leaks
from peftchat.dataset.pairs import encode_pairs
from peftchat.errors import UserError
from peftchat.files import cache_root, write_text

if TYPE_CHECKING:
    from peftchat.recipe import DataEntry, Recipe


T = TypeVar("T")
Split = Literal["train", "eval"]

_SMALL_FILES = 2**25
"""Bytes of conversations that are read in half a second."""

_FORMAT = 12
"""Version of the cache: to be raised when the same settings give other examples or other files."""


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """The examples of one split, and their counts."""

    store: ExampleStore
    stats: EncodingStats


def load_splits(recipe: "Recipe", chat: ChatFormat) -> dict[Split, EncodedSplit]:
    """Return the examples to train on, and the held-out ones if the recipe has any.

    Raises:
        UserError: a source cannot be read, no example is left, or most examples have no target.
    """
    splits = encode_splits(recipe, chat)
    for split, encoded in splits.items():
        _check(recipe, split, encoded.stats)
    return splits


def _no_progress(conversations: int) -> None:
    """Report nothing."""


def encode_splits(
    recipe: "Recipe", chat: ChatFormat, progress: Callable[[int], None] = _no_progress
) -> dict[Split, EncodedSplit]:
    """Return the examples of each split like `load_splits`, even if none is left.

    Args:
        recipe: its sources and settings.
        chat: the recipe's chat format.
        progress: called now and then with the number of conversations encoded so far; never if the examples are cached.

    Raises:
        UserError: a source cannot be read, or has something that the recipe makes an error.
    """
    from filelock import FileLock

    folder = _entry(_key(recipe, chat))
    if not folder.is_dir():
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _build(recipe, chat, folder, progress)
    return {split: _open(folder, split) for split in _splits(recipe)}


def _entry(name: str) -> Path:
    """Return the folder of an entry of the cache; if it is not there, the folder around it is made.

    Raises:
        UserError: nothing can be written there.
    """
    where = None
    try:
        folder = cache_root() / "examples" / name
        if not folder.is_dir():
            where = str(folder.parent)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(folder.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"encoded data cannot be kept ({error.strerror})"
        raise UserError(what, where=where, hint="Set PEFTCHAT_CACHE to a folder that can be written.") from error
    return folder


def check_small_files(recipe: "Recipe") -> None:
    """Read the conversations of a recipe whose files are small, so that a bad record is told at once.

    No tokenizer is needed. Larger files are read when they are encoded.

    Raises:
        UserError: a record cannot be used.
    """
    found = [find_files(entry.path, entry.split) for entry in (*recipe.data.train, *(recipe.data.eval or ()))]
    # A hub data set is in no file yet.
    if sum(file.stat().st_size for files in found for file in files or ()) > _SMALL_FILES or None in found:
        return
    for split in _splits(recipe):
        for _ in _numbered(recipe, split, ProblemLog(strict=True)):
            pass


def _splits(recipe: "Recipe") -> list[Split]:
    return ["train", "eval"] if recipe.data.has_eval else ["train"]


def _open(folder: Path, split: Split) -> EncodedSplit:
    stats = EncodingStats(**json.loads((folder / f"{split}.json").read_text(encoding="utf-8")))
    return EncodedSplit(ExampleStore(folder / f"{split}.arrow"), stats)


def _key(recipe: "Recipe", chat: ChatFormat) -> str:
    """Return a name that changes with everything that changes the examples."""
    data = recipe.data
    inputs: dict[str, Any] = {
        "format": _FORMAT,
        "tokenizer": tokenizer_digest(chat.tokenizer),
        "template": [chat.template.name, chat.template.jinja, chat.template.end_token, chat.template.written_date],
        "chat": recipe.chat.model_dump(mode="json"),
        "data": data.model_dump(mode="json", exclude={"packing", "pad_to_multiple_of"}),
        "seed": recipe.training.seed,
        **{name: True for name, is_read in recipe.answers_read.items() if is_read},
        "sources": [_content(entry) for entry in [*data.train, *(data.eval or ())]],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def _content(entry: "DataEntry") -> list[str]:
    """Return the digests of an entry's files; for a hub dataset, its current commit."""
    files = find_files(entry.path, entry.split)
    if files is None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return [str(HfApi().dataset_info(entry.path, revision=entry.revision).sha)]
        except (HfHubHTTPError, OSError, ValueError):
            return ["offline"]
    digests = []
    for file in files:
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests


def _build(recipe: "Recipe", chat: ChatFormat, folder: Path, progress: Callable[[int], None]) -> None:
    """Encode the splits into a temporary folder and rename it; the caller holds the folder's lock."""
    # No other process builds under the lock, so these folders were left by a process that was killed.
    for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        # Libraries and vocabulary are a million objects; garbage collection would visit them for every batch.
        gc.freeze()
        encoder = chat.encoder()
        encode = encode_pairs if recipe.has_pairs else encode_conversations
        done = 0
        # A share of `data.train` is drawn so that equal conversations are on one side: nothing to look for.
        leaks = Leaks.of(conversations(recipe, "eval", ProblemLog(strict=True)) if recipe.data.eval is not None else ())
        for split in _splits(recipe):
            log = ProblemLog(strict=True)
            stats = EncodingStats()
            stats.by_source = [0] * len(_entries(recipe, split))
            with ExampleWriter(temporary / f"{split}.arrow") as writer:
                for place, stream in _by_source(_numbered(recipe, split, log)):
                    watched = leaks.watch(stream) if split == "train" else stream
                    before = stats.examples
                    for examples in encode(recipe, encoder, watched, stats):
                        writer.write(examples)
                        stats.by_source[place] += stats.examples - before
                        before = stats.examples
                        progress(done + stats.examples + sum(stats.dropped.values()))
            done += stats.examples + sum(stats.dropped.values())
            stats.formats, stats.notes, stats.left_out = dict(log.formats), dict(log.notes), dict(log.skipped)
            stats.unused = {
                name: f"{use.records} (first {use.first})"
                for name, use in log.unused.items()
                # The reader knows no template.
                if name != "documents" or not chat.template.reads_documents
            }
            stats.remarks = log.sentences() + (leaks.sentences() if split == "eval" else [])
            write_text(temporary / f"{split}.json", json.dumps(asdict(stats)))
        temporary.replace(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = sum(path.stat().st_size for path in temporary.iterdir())
        raise UserError(
            f"the disk is full: {size / 1e6:,.0f} MB of encoded examples were written, and they are not all",
            where=str(folder.parent),
            hint="Free disk space, or set PEFTCHAT_CACHE to a folder on a larger disk: five bytes a token are needed.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def conversations(recipe: "Recipe", split: Split, log: ProblemLog) -> Iterator[Conversation]:
    """Yield the conversations of one split, before any is truncated or dropped.

    With `data.resample`, those to train on come once each, whatever the weights.
    """
    numbered = _numbered(recipe, split, log)
    return (conversation for _, conversation in numbered)


def _numbered(recipe: "Recipe", split: Split, log: ProblemLog) -> Iterator[tuple[int, Conversation]]:
    """Yield the conversations of one split, each with the number of its source."""
    data, seed = recipe.data, recipe.training.seed
    entries = _entries(recipe, split)
    # The shares of an epoch are drawn from all conversations; what is held out is drawn once.
    weighted = split == "eval" or not data.resample
    selected = read_numbered(entries, seed, problems=log, consecutive=data.consecutive, weighted=weighted,
                             **recipe.answers_read)  # fmt: skip
    if data.eval_fraction is not None:
        everything = read_numbered(data.train, seed, consecutive=data.consecutive, weighted=not data.resample,
                                   **recipe.answers_read)  # fmt: skip
        splitter = fit_split((conversation for _, conversation in everything), data.eval_fraction, seed)
        if split == "eval":
            log.told += splitter.remarks
        selected = (one for one in selected if splitter.is_eval(one[1]) == (split == "eval"))
    limit = "max_train_samples" if split == "train" else "max_eval_samples"
    return _limited(selected, limit, getattr(data, limit), entries, log)


def _entries(recipe: "Recipe", split: Split) -> "Sequence[DataEntry]":
    """Return the sources of a split."""
    data = recipe.data
    return data.eval if split == "eval" and data.eval is not None else data.train


def _by_source(numbered: Iterator[tuple[int, T]]) -> Iterator[tuple[int, Iterator[T]]]:
    """Yield each source's number and what it has; each is to be read to its end before the next."""
    for place, pairs in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield place, (one for _, one in pairs)


_MOST_COUNTED = 10_000


def _limited(
    stream: Iterator[T], key: str, limit: int | None, entries: "Sequence[DataEntry]", log: ProblemLog
) -> Iterator[T]:
    """Yield the first conversations, and count those that the limit leaves out.

    At most 10,000 are counted. A hub dataset, which would be downloaded for it, is not read on.
    """
    if limit is None:
        yield from stream
        return
    yield from itertools.islice(stream, limit)
    most = 1 if any(find_files(entry.path, entry.split) is None for entry in entries) else _MOST_COUNTED
    left_out = 0
    try:
        for _ in itertools.islice(stream, most):
            left_out += 1
    except UserError as error:
        # Nothing behind the limit is trained on, so that a bad record there ends the count and nothing else.
        log.told.append(f"Behind data.{key} the data cannot be read on: {error}")
    if left_out:
        log.skipped[key] += left_out
    if left_out == most:
        log.told.append(f"Reading ended {most:,} conversations behind data.{key}; there may be more.")


def _check(recipe: "Recipe", split: Split, stats: EncodingStats) -> None:
    """Check that a split has examples, most of them with a target.

    Raises:
        UserError: with the reasons why examples were left out.
    """
    dropped = sum(stats.dropped.values())
    left_out = {**stats.left_out, **stats.dropped}
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in left_out.items())
    remarks = " ".join(stats.remarks).rstrip(".")
    untrainable = stats.dropped.get("nothing_to_learn", 0)
    if not stats.examples:
        purpose = "train" if split == "train" else "evaluate"
        raise UserError(
            f"no example is left to {purpose} on ({reasons or remarks or 'the source is empty'})",
            where=f"data.{split if split == 'train' or recipe.data.eval is not None else 'eval_fraction'}",
            hint="Check the source, data.max_length and chat.loss_on.",
        )
    _check_length(recipe, split, stats)
    if stats.ends_only == stats.examples:
        raise UserError(
            f"only the tokens that end answers would be trained, by chat.loss_on: {recipe.chat.loss_policy}",
            where=f"data.{split}",
            hint="The answers hold nothing else than what these keys leave out. Remove the key that is false.",
        )
    if untrainable > (stats.examples + dropped) / 2:
        raise UserError(
            f"{untrainable} of {stats.examples + dropped} examples have nothing to learn, the first is "
            f"{stats.first_sources['nothing_to_learn'][0]}",
            where=f"data.{split}",
            hint="Check that the conversations have assistant messages, and that chat.loss_on selects them.",
        )


def _check_length(recipe: "Recipe", split: Split, stats: EncodingStats) -> None:
    """Check that most examples are not too long.

    Raises:
        UserError: they are.
    """
    too_long, everything = stats.dropped.get("too_long", 0), stats.examples + sum(stats.dropped.values())
    if too_long > everything / 2:
        raise UserError(
            f"{too_long} of {everything} conversations have more tokens than data.max_length: "
            f"{recipe.data.max_length}, and no round of them fits; the first is {stats.first_sources['too_long'][0]}",
            where=f"data.{split}",
            hint="Raise data.max_length, or remove them from the data.",
        )


def _continuation(example: EncodedExample, candidates: Sequence[EncodedExample]) -> EncodedExample:
    """Return the one of a conversation's examples that goes on from this one; the last if none does."""
    ids = example.ids.tolist()
    return next((one for one in candidates if one.ids[: len(ids)].tolist() == ids), candidates[-1])


def with_full_examples(
    recipe: "Recipe", chat: ChatFormat, split: Split, examples: Iterable[EncodedExample]
) -> Iterator[tuple[EncodedExample, EncodedExample]]:
    """Yield each example together with its conversation encoded in full.

    The sources are read once more, only as far as needed.

    Args:
        recipe: the recipe of the examples.
        chat: its chat format.
        split: the split of the examples.
        examples: some of its examples, in order.
    """
    encoder = chat.encoder()
    stream = conversations(recipe, split, ProblemLog(strict=True))
    full: EncodedExample | None = None
    for example in examples:
        if full is None or full.source != example.source:
            found = next((conversation for conversation in stream if conversation.source == example.source), None)
            full = example if found is None else _continuation(example, encoder.encode([found]))
        yield example, full
