"""Where a command may write: nothing of the user's is destroyed, whatever the flags.

An output that is, holds or links to an input, the working folder, the home folder or a checkpoint is refused before
any work. Paths are compared by what they lead to (device and inode), so `..`, links, hard links, bind mounts and
names that differ in case only are seen through.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peftchat.addresses import scheme_of
from peftchat.errors import UserError
from peftchat.paths import check_new_name

_TRAINER_STATE = "trainer_state.json"
"""Transformers' mark of a checkpoint."""

_CHECKPOINTS = "checkpoints"
_HINT = "Choose another output."

_Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class InputPath:
    """Something that a command reads.

    Attributes:
        path: its path; one that does not exist, such as a hub id, is never met.
        name: what it is, with its article: `the base model`.
        is_read_recursively: every file below it is read, so that an output must not be there.
    """

    path: Path
    name: str
    is_read_recursively: bool = False


def check_output(output: Path, inputs: Iterable[InputPath], where: str, *, continues: bool = False) -> None:
    """Check that a command may write a file or a folder of this name, without touching it.

    Whether something that is already there may be replaced is for the command to decide.

    Args:
        output: the file or folder.
        inputs: what the command reads.
        where: how error messages refer to the output.
        continues: the output is a run that goes on, and may be the working folder.

    Raises:
        UserError: it may not.
    """
    check_new_name(output, where)
    scheme = scheme_of(str(output))
    if scheme is not None and not Path(output.parts[0]).exists():
        what = f"the output is an address (`{scheme}:`), expected a path on this machine"
        raise UserError(what, where=where, hint="Write to a folder, and copy it when it is finished.")
    _check_place(output, where)
    chain = _identities(output)
    own = chain[0] if output.exists() else None
    for path, name in _protected():
        if continues and path == Path.cwd():
            continue
        if own is not None and own in _identities(path):
            is_it = own == _identities(path)[0]
            raise UserError(f"the output {'is' if is_it else 'holds'} {name}", where=where, hint=_HINT)
    for entry in inputs:
        _check_input(output, own, chain, entry, where)
    for folder in (output, *Path(os.path.realpath(output)).parents):
        if _is_checkpoint(folder):
            relation = "is" if folder == output else "lies in"
            raise UserError(f"the output {relation} a checkpoint of a run: {folder}", where=where, hint=_HINT)


def check_output_file(
    output: Path, inputs: Iterable[InputPath], where: str, *, is_ours: Callable[[Path], bool], kind: str
) -> Path:
    """Check that a command may write or replace a file, and return the path to write to, links followed.

    Args:
        output: the file.
        inputs: what the command reads.
        where: how error messages refer to the output.
        is_ours: whether a file that is there was written by this command.
        kind: what the command writes, with its article: `an HTML page`.

    Raises:
        UserError: it may not, or what is there is not of that kind.
    """
    check_output(output, inputs, where)
    if output.exists():
        if not output.is_file():
            what = "a folder" if output.is_dir() else "a device or a pipe"
            raise UserError(f"the output is {what}, expected the name of a file", where=where, hint=_HINT)
        if output.stat().st_size and not is_ours(output):
            raise UserError(f"the file is there already and is not {kind} of peftchat's", where=where, hint=_HINT)
    return Path(os.path.realpath(output))


def check_replaceable(folder: Path, kind: str, foreign: str | None, where: str) -> None:
    """Refuse to replace a folder that holds anything but what the command itself wrote.

    Args:
        folder: an existing folder.
        kind: what the command writes, with its article: `a merged model`.
        foreign: the name of something in the folder that the command did not write; "" if its report is missing; None
            if there is nothing.
        where: how error messages refer to the folder.

    Raises:
        UserError: it holds something else, or is a link.
    """
    if folder.is_symlink():
        hint = "Name the folder itself."
        raise UserError(f"the output is a link to {os.path.realpath(folder)}", where=where, hint=hint)
    if foreign is None:
        return
    if not foreign:
        what = f"the output is not {kind} of peftchat's, so it is never replaced"
        raise UserError(what, where=where, hint=_HINT)
    what = f"the output holds `{foreign}`, which is not part of {kind}, so it is not replaced"
    raise UserError(what, where=where, hint="Move that away, or choose another output.")


def replace_folder(new: Path, output: Path) -> None:
    """Give a finished folder its name. The folder that it replaces is moved aside, and removed last.

    Raises:
        OSError: it cannot; the former folder is then back in its place.
    """
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        new.rename(output)
        return
    old = free_name(output, "old")
    try:
        output.rename(old)
        new.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def free_name(output: Path, suffix: str) -> Path:
    """Return a name beside an output that nothing has: `OUTPUT.old`, `OUTPUT.old.2` and so on."""
    name = beside = output.with_name(f"{output.name}.{suffix}")
    number = 2
    while os.path.lexists(name):
        name = beside.with_name(f"{beside.name}.{number}")
        number += 1
    return name


def _check_place(output: Path, where: str) -> None:
    """Check that the nearest existing folder is one, and is writable."""
    if output.is_symlink() and not output.exists():
        what = f"the output is a link that leads nowhere, to {output.readlink()}"
        raise UserError(what, where=where, hint=_HINT)
    above = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path))
    if above == output.absolute() and not above.is_dir():
        above = above.parent
    if not above.is_dir():
        found = "a link that leads nowhere" if above.is_symlink() else "a file, not a folder"
        raise UserError(f"{above} is {found}", where=where, hint=_HINT)
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above} is not writable", where=where, hint="Choose a folder that you may write to.")


def _protected() -> Iterator[tuple[Path, str]]:
    """Return the folders that no output is or holds."""
    yield Path("/"), "the root of the file system"
    yield Path.cwd(), "the working folder"
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - without a home folder this returns `~`
    if home.is_absolute() and home.exists():
        yield home, "your home folder"


def _check_input(output: Path, own: _Identity | None, chain: list[_Identity], entry: InputPath, where: str) -> None:
    if not _exists(entry.path):
        return
    around = _identities(entry.path)
    if own == around[0] or os.path.realpath(output) == os.path.realpath(entry.path):
        raise UserError(f"the output is {entry.name} itself: {entry.path}", where=where, hint=_HINT)
    # A link among the inputs may stand in one folder and lead to another.
    if own in around or own in _identities(entry.path.parent):
        raise UserError(f"the output holds {entry.name}: {entry.path}", where=where, hint=_HINT)
    if around[0] in chain and not entry.path.is_dir():
        raise UserError(f"the output lies below {entry.name}, which is a file", where=where, hint=_HINT)
    if around[0] in chain and entry.is_read_recursively:
        what = f"the output lies in {entry.name}, so it would be read as part of it: {entry.path}"
        raise UserError(what, where=where, hint=_HINT)


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, or where a run keeps its checkpoints."""
    if folder.name == _CHECKPOINTS and (folder.parent / "recipe.yaml").is_file():
        return True
    return (folder / _TRAINER_STATE).is_file()


def _identities(path: Path) -> list[_Identity]:
    """Return device and inode of a path, if it exists, and of every folder above it, links followed."""
    real = Path(os.path.realpath(path))
    return [found for found in map(_identity, (real, *real.parents)) if found is not None]


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return None if stat.S_ISSOCK(status.st_mode) else (status.st_dev, status.st_ino)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
