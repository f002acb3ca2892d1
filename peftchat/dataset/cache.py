"""A recipe's data as encoded rows: read, split, encoded, cut, counted, and kept for the next run.

Rows are cached by the content of their sources and by every setting that touches them. The first process to ask
builds them under a lock; every other one, in this run or another, maps the finished file.
"""

import gc
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.chat_template.examples import EncodedExample, ExampleStore, ExampleWriter
from peftchat.conversation import Conversation
from peftchat.conversations import ProblemLog
from peftchat.conversations.readers import find_files
from peftchat.conversations.reading import read_sources
from peftchat.conversations.splitting import fit_split
from peftchat.dataset.encode import EncodingStats, encode_conversations
from peftchat.errors import UserError
from peftchat.files import write_text

if TYPE_CHECKING:
    from peftchat.recipe import DataEntry, Recipe


Split = Literal["train", "eval"]

_FORMAT = 3
"""Raised when rows of the same settings would come out differently."""


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """The encoded rows of one side and what is known about them."""

    store: ExampleStore
    stats: EncodingStats


def cache_root() -> Path:
    """The folder for things that can be made again: `PEFTCHAT_CACHE`, else the user's cache folder."""
    own = os.environ.get("PEFTCHAT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peftchat"


def load_splits(recipe: "Recipe", chat: ChatFormat) -> dict[Split, EncodedSplit]:
    """The rows to train on, and those held out where the recipe has any.

    Raises:
        UserError: a source cannot be read, no row is left, or most rows have nothing to learn.
    """
    rows = encode_splits(recipe, chat)
    for side, encoded in rows.items():
        _check(recipe, side, encoded.stats)
    return rows


def _no_progress(conversations: int) -> None:
    """Say nothing."""


def encode_splits(
    recipe: "Recipe", chat: ChatFormat, progress: Callable[[int], None] = _no_progress
) -> dict[Split, EncodedSplit]:
    """The rows of each side as `load_splits` gives them, be there any left or not.

    Args:
        recipe: names the sources and every setting.
        chat: the recipe's format.
        progress: called now and then with the number of conversations encoded so far; never if the rows are there
            already.

    Raises:
        UserError: a source cannot be read, or holds what the recipe refuses.
    """
    from filelock import FileLock

    folder = cache_root() / "rows" / _key(recipe, chat)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _build(recipe, chat, folder, progress)
    return {side: _open(folder, side) for side in _sides(recipe)}


def _sides(recipe: "Recipe") -> list[Split]:
    return ["train", "eval"] if recipe.data.has_eval else ["train"]


def _open(folder: Path, side: Split) -> EncodedSplit:
    stats = EncodingStats(**json.loads((folder / f"{side}.json").read_text(encoding="utf-8")))
    return EncodedSplit(ExampleStore(folder / f"{side}.arrow"), stats)


def _key(recipe: "Recipe", chat: ChatFormat) -> str:
    """A name that changes with anything that would change the rows."""
    data = recipe.data
    tokenizer = chat.tokenizer
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    said: dict[str, Any] = {
        "format": _FORMAT,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "special": sorted(map(str, tokenizer.added_tokens_decoder.values())),
        "template": [chat.template.name, chat.template.jinja, chat.template.end_token],
        "chat": recipe.chat.model_dump(mode="json"),
        "data": data.model_dump(mode="json", exclude={"packing", "pad_to_multiple_of"}),
        "seed": recipe.training.seed,
        "sources": [_content(entry) for entry in [*data.train, *(data.eval or ())]],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _content(entry: "DataEntry") -> list[str]:
    """Digests of an entry's files; for a hub data set, the commit that its name stands for now."""
    files = find_files(entry.path, entry.split)
    if files is None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return [str(HfApi().dataset_info(entry.path).sha)]
        except (HfHubHTTPError, OSError, ValueError):
            return ["offline"]
    digests = []
    for file in files:
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests


def _build(recipe: "Recipe", chat: ChatFormat, folder: Path, progress: Callable[[int], None]) -> None:
    """Encode both sides into a temporary folder and rename it into place; the caller holds the folder's lock."""
    # Nobody else builds under the lock, so what lies here was left by a process that was killed.
    for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        # The libraries and the vocabulary are a million objects that the collector would walk through for every batch.
        gc.freeze()
        encoder = chat.encoder()
        seen = 0
        for side in _sides(recipe):
            log = ProblemLog(strict=True)
            stats = EncodingStats()
            with ExampleWriter(temporary / f"{side}.arrow") as writer:
                for rows in encode_conversations(recipe, encoder, conversations(recipe, side, log), stats):
                    writer.write(rows)
                    progress(seen + stats.rows + sum(stats.dropped.values()))
            seen += stats.rows + sum(stats.dropped.values())
            stats.forms, stats.notes = dict(log.forms), {**log.notes, **log.skipped}
            write_text(temporary / f"{side}.json", json.dumps(asdict(stats)))
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def conversations(recipe: "Recipe", side: Split, log: ProblemLog) -> Iterator[Conversation]:
    """The conversations of one side in the order of their rows, before any is cut or left out."""
    data, seed = recipe.data, recipe.training.seed
    if side == "eval" and data.eval is not None:
        chosen = read_sources(data.eval, seed, problems=log)
    elif data.eval_fraction is None:
        chosen = read_sources(data.train, seed, problems=log)
    else:
        split = fit_split(read_sources(data.train, seed), data.eval_fraction, seed)
        everything = read_sources(data.train, seed, problems=log)
        chosen = (conversation for conversation in everything if split.is_eval(conversation) == (side == "eval"))
    return itertools.islice(chosen, data.max_train_rows if side == "train" else data.max_eval_rows)


def _check(recipe: "Recipe", side: Split, stats: EncodingStats) -> None:
    """Refuse a side on which nothing, or next to nothing, is left.

    Raises:
        UserError: with what became of the rows.
    """
    dropped = sum(stats.dropped.values())
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in stats.dropped.items())
    empty = stats.dropped.get("nothing_to_learn", 0)
    if not stats.rows:
        raise UserError(
            f"no row is left to {'train' if side == 'train' else 'evaluate'} on ({reasons or 'the source is empty'})",
            where=f"data.{side if side == 'train' or recipe.data.eval is not None else 'eval_fraction'}",
            hint="Check the source, data.max_length and chat.loss_on.",
        )
    if empty > (stats.rows + dropped) / 2:
        raise UserError(
            f"{empty} of {stats.rows + dropped} rows have nothing to learn, the first is "
            f"{stats.named['nothing_to_learn'][0]}",
            where=f"data.{side}",
            hint="Most conversations lack an assistant message, or chat.loss_on does not fit them.",
        )


def with_full_examples(
    recipe: "Recipe", chat: ChatFormat, side: Split, rows: Iterable[EncodedExample]
) -> Iterator[tuple[EncodedExample, EncodedExample]]:
    """Each row together with its conversation encoded in full.

    The source is read once more, only as far as needed.

    Args:
        recipe: what the rows were encoded by.
        chat: its format.
        side: whose rows they are.
        rows: some of them, in their order.
    """
    encoder = chat.encoder()
    stream = conversations(recipe, side, ProblemLog(strict=True))
    whole: EncodedExample | None = None
    for row in rows:
        if whole is None or whole.source != row.source:
            found = next((conversation for conversation in stream if conversation.source == row.source), None)
            whole = row if found is None else encoder.encode([found])[0]
        yield row, whole
