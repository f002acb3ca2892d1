"""From a path to files: what a folder or a pattern means, by the splits in the files' names."""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from peftchat.addresses import advice_on_page
from peftchat.errors import UserError
from peftchat.paths import expand_path

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_PACKED = ("", ".gz", ".zst")
ENDINGS = (*(text + packed for text in _TEXT for packed in _PACKED), ".parquet", ".arrow")
"""The endings of files that are read."""
KNOWN_ENDINGS = f"{', '.join(_TEXT)} (also with .gz or .zst), .parquet, .arrow"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("eval", "evaluation", "validation", "valid", "val", "dev"), "eval"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "card.json"}
_ASIDE = re.compile(r"(readme|licen[cs]e|notice|citation|changelog|authors|card|dataset_?card)\b.*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """What a path means.

    Attributes:
        files: the data files, in order of their names; None for a hub id.
        unread: files that lie there too and are not read -> why.
    """

    files: list[Path] | None
    unread: dict[str, str] = field(default_factory=dict)


def ending_of(path: Path) -> str | None:
    """The ending by which a file is read, None if it is not read."""
    name = path.name.lower()
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def find_files(path: str, split: str | None = None) -> list[Path] | None:
    """The data files that `path` means, see `find_data`; None for a hub id.

    Raises:
        UserError: as `find_data`.
    """
    return find_data(path, split).files


def find_data(path: str, split: str | None = None) -> FoundFiles:
    """The data files that `path` means: a file, a folder, a pattern such as `data/*.jsonl`, or a hub id.

    A split's name may stand anywhere in the name of a file or of a folder around it: `train.jsonl`,
    `my_test_set.parquet`, `eval/a.json`. If any file has one, only those of `split` are read, `train` if it is not
    given. `eval`, `validation`, `valid`, `val` and `dev` are one split.

    Raises:
        UserError: nothing there, nothing to read there, no such split, or names of two splits in one.
    """
    if path == "-":
        raise _no_file(path)
    text = expand_path(path, path)
    place = Path(text)
    if place.is_dir():
        return _choose(path, place, list(_walk(place)), split)
    if place.exists():
        return FoundFiles([_single_file(place, split)])
    if glob.has_magic(text):
        return _of_pattern(path, text, split)
    if _HUB_ID.fullmatch(path) and ending_of(place) is None:
        return FoundFiles(None)
    what = "a link that leads nowhere" if place.is_symlink() else "there is no such file or folder"
    raise UserError(what, where=path, hint=advice_on_page(path) or "Check the path.")


def check_no_hub_keys(path: str, subset: str | None, revision: str | None) -> None:
    """Check that a local path has no key that belongs to hub data sets.

    Raises:
        UserError: it has.
    """
    for key, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            hint = "Leave it out, or name the files of the subset in `path`." if key == "subset" else "Leave it out."
            raise UserError(f"`{key}: {value}` belongs to hub data sets, and this path is local", where=path, hint=hint)


def _no_file(path: str) -> UserError:
    """The error for a pipe or a device: data are read more than once, and such a thing only gives them once."""
    hint = "Write the records into a file first: COMMAND > FILE.jsonl."
    return UserError("a pipe or a device, and not a file", where=path, hint=hint)


def _single_file(path: Path, split: str | None) -> Path:
    if not path.is_file():
        raise _no_file(str(path))
    if split is not None:
        hint = "Leave `split` out, or give the folder."
        raise UserError(f"a single file has no split {split!r}", where=str(path), hint=hint)
    if ending_of(path) is None:
        raise UserError(f"unknown file ending {path.suffix!r}", where=str(path), hint=f"Use one of {KNOWN_ENDINGS}.")
    if path.stat().st_size == 0:
        raise UserError("the file is empty", where=str(path), hint="Give a file with records.")
    return path


def _of_pattern(path: str, text: str, split: str | None) -> FoundFiles:
    found: list[Path] = []
    # `Path.glob` takes no absolute pattern.
    for match in map(Path, sorted(glob.glob(text, recursive=True))):  # noqa: PTH207
        found += _walk(match) if match.is_dir() else [match]
    if not found:
        raise UserError("no file matches this pattern", where=path, hint="Check the path.")
    fixed = Path(*Path(text).parts[: _first_magic(text)])
    pattern = Path(text).relative_to(fixed)
    # A pattern that names a split asks for it, as `split` does.
    asked = _split_of(pattern, fixed) if split is None else None
    return _choose(path, fixed, list(dict.fromkeys(found)), split or asked or None)


def _first_magic(text: str) -> int:
    return next(number for number, part in enumerate(Path(text).parts) if glob.has_magic(part))


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, linked ones too, by name; hidden ones are left out.

    `Path.rglob` passes over linked folders. Each real folder is entered once, so a circle of links ends.
    """
    entered: set[str] = set()
    found: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if not name.startswith(".")]
    yield from sorted(found)


def _choose(path: str, folder: Path, candidates: list[Path], split: str | None) -> FoundFiles:
    """The files of a split among the candidates, and why the others are not read."""
    unread: dict[str, str] = {}
    saved = _saved_files(candidates)
    prepared = {file.parent for file in candidates if file.name == "card.json"}
    files: list[Path] = []
    real: dict[str, Path] = {}
    for file in candidates:
        if file.name in _DESCRIPTIONS or _ASIDE.fullmatch(file.name):
            continue
        if file.name == "quarantine.jsonl" and file.parent in prepared:
            continue
        if not file.exists():
            raise UserError("a link that leads nowhere", where=str(file), hint="Repair or remove the link.")
        if file.parent in saved and file not in saved[file.parent]:
            unread[str(file)] = "the folder's state.json does not list it"
        elif not file.is_file():
            unread[str(file)] = "it is a pipe or a device, and not a file"
        elif ending_of(file) is None:
            unread[str(file)] = "its ending is not one that is read"
        elif (first := real.setdefault(os.path.realpath(file), file)) != file:
            unread[str(file)] = f"it is a link to {first}"
        else:
            files.append(file)
    if not files:
        others = f"; not read: {_names(unread)}" if unread else ""
        raise UserError(f"the folder holds no data files{others}", where=path, hint=f"Known endings: {KNOWN_ENDINGS}.")
    return _of_split(path, folder, files, split, unread)


def _of_split(path: str, folder: Path, files: list[Path], split: str | None, unread: dict[str, str]) -> FoundFiles:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder), folder), []).append(file)
    named = sorted(name for name in by_split if name)
    if not named and split is None:
        return FoundFiles(files, unread)
    wanted = split or "train"
    chosen = by_split.get(_SPLITS.get(wanted, wanted))
    if not chosen:
        found = ", ".join(named) or "none"
        names = f" ({_names(map(str, files))})" if named else ""
        hint = "Set `split` to one of them, or name the file itself." if named else "Leave `split` out."
        raise UserError(f"no file of split {wanted!r}; splits found: {found}{names}", where=path, hint=hint)
    for file in by_split.get("", ()):
        unread[str(file)] = "its name has no split, and others have one"
    return FoundFiles(chosen, unread)


def _split_of(relative: Path, folder: Path) -> str:
    """The split that a file's name or the folders around it name, "" if none does.

    Raises:
        UserError: they name two.
    """
    found = {split for part in relative.parts if (split := _split_in(part, folder / relative))}
    if len(found) > 1:
        raise _two_splits(folder / relative, found)
    return found.pop() if found else ""


def _split_in(name: str, path: Path) -> str:
    words = [word for word in re.split(r"[^a-z]+", _spaced(name).lower()) if word]
    found = [_SPLITS[word] for word in words if word in _SPLITS]
    if len(set(found)) > 1 and words[0] not in _SPLITS:
        raise _two_splits(path, set(found))
    return found[0] if found else ""


def _spaced(name: str) -> str:
    """The name with its words apart: `myTestSet` is `my Test Set`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


def _two_splits(path: Path, found: Iterable[str]) -> UserError:
    return UserError(
        f"the name speaks of two splits: {' and '.join(sorted(found))}",
        where=str(path),
        hint="Rename the file or folder, or name the files to read one by one.",
    )


def _saved_files(candidates: list[Path]) -> dict[Path, set[Path]]:
    """Folders that `datasets.save_to_disk` wrote -> the data files that belong to them.

    Caches of earlier transformations lie in the same folder.

    Raises:
        UserError: a file of the data set is not there.
    """
    saved: dict[Path, set[Path]] = {}
    for file in candidates:
        if file.name != "state.json":
            continue
        try:
            listed = json.loads(file.read_text(encoding="utf-8"))["_data_files"]
            names = {file.with_name(entry["filename"]) for entry in listed}
        except (ValueError, KeyError, TypeError, OSError):
            continue  # a state.json of something else
        missing = sorted(names - set(candidates))
        if missing:
            hint = "Save the data set again, or copy the folder again."
            raise UserError(f"state.json lists {missing[0].name}, which is not there", where=str(file), hint=hint)
        saved[file.parent] = names
    return saved


def _names(paths: Iterable[str]) -> str:
    names = [Path(path).name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
