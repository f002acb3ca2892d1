"""From a path to records: which files a path means, and the reader for each kind of file."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from peftchat.conversations.problems import ProblemLog, RawRecord
from peftchat.conversations.readers.json_values import read_json_values
from peftchat.conversations.readers.jsonl import read_jsonl
from peftchat.conversations.readers.tables import read_csv, read_parquet
from peftchat.errors import UserError
from peftchat.paths import expand_path

Reader = Callable[[Path, int, ProblemLog], Iterator[RawRecord]]

READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json_values,
    ".parquet": read_parquet,
    ".csv": read_csv,
}
"""File ending -> reader."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = {"train": "train", "eval": "eval", "validation": "eval", "valid": "eval", "dev": "eval", "test": "test"}
_SPLIT_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "card.json"}


def reader_for(path: Path) -> Reader | None:
    """The reader for a file's ending, None where there is none."""
    for ending, reader in READERS.items():
        if path.name.lower().endswith(ending):
            return reader
    return None


def find_files(path: str, split: str | None = None) -> list[Path] | None:
    """The data files that `path` means, in order of their names; None for a hub id.

    In a folder whose files are named by split (`train.jsonl`, `test-00000-of-00002.parquet`, `eval/a.json`) only
    those of `split` count, `train` if it is not given. `eval`, `validation`, `valid` and `dev` are one split.

    Raises:
        UserError: nothing there, nothing to read there, or no such split.
    """
    place = Path(expand_path(path, path))
    if place.is_dir():
        return _in_folder(place, split)
    if place.exists():
        return [_single_file(place, split)]
    if _HUB_ID.fullmatch(path) and reader_for(place) is None:
        return None
    raise UserError("there is no such file or folder", where=path, hint="Check the path.")


def _single_file(path: Path, split: str | None) -> Path:
    if split is not None:
        hint = "Leave `split` out, or give the folder."
        raise UserError(f"a single file has no split {split!r}", where=str(path), hint=hint)
    if reader_for(path) is None:
        endings = ", ".join(READERS)
        raise UserError(f"unknown file ending {path.suffix!r}", where=str(path), hint=f"Use one of {endings}.")
    if path.stat().st_size == 0:
        raise UserError("the file is empty", where=str(path), hint="Give a file with records.")
    return path


def _in_folder(folder: Path, split: str | None) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and reader_for(file) is not None
        and file.name not in _SPLIT_FILES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        endings = ", ".join(READERS)
        raise UserError("the folder holds no data files", where=str(folder), hint=f"Known endings: {endings}.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    named = sorted(name for name in by_split if name)
    if not named and split is None:
        return files
    wanted = split or "train"
    chosen = by_split.get(_SPLITS.get(wanted, wanted))
    if not chosen:
        found = ", ".join(named) or "none"
        raise UserError(f"no file of split {wanted!r}; splits found: {found}", where=str(folder))
    return chosen


def _split_of(relative: Path) -> str:
    """The split that a file's name or folder names, "" if none does."""
    for part in (relative.name, *relative.parts[:-1]):
        stem = re.split(r"[-_.]", part.lower(), maxsplit=1)[0]
        if stem in _SPLITS:
            return _SPLITS[stem]
    return ""
