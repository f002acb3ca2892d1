"""Where a merge writes: what it may replace, its working folder, and how the result gets its name."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peftchat.errors import UserError
from peftchat.merging.merge_plan import RESUME_STATE_NAME
from peftchat.merging.output import COPIED, REPORT_NAME, UNVERIFIED_CONFIG, make_loadable
from peftchat.models.saving import TOKEN_ROWS
from peftchat.models.source import MODEL_CONFIG, WEIGHTS_INDEX
from peftchat.output_paths import InputPath, check_output, check_replaceable, free_name, replace_folder

LOCK = ".lock"

_SMALL = {*COPIED, WEIGHTS_INDEX, MODEL_CONFIG, REPORT_NAME}
_OF_A_MERGE_IN_PROGRESS = {
    UNVERIFIED_CONFIG,
    RESUME_STATE_NAME,
    Path(RESUME_STATE_NAME).with_suffix(".part").name,
    LOCK,
}
_SHARDS = ("model*.safetensors", "model*.safetensors.part")


def check_output_folder(output: Path, run: Path, inputs: Sequence[InputPath], *, overwrite: bool) -> None:
    """Check that a merge may write to a folder.

    A merge that was moved aside when the process was killed comes back first.

    Args:
        output: the folder.
        run: the run that is merged.
        inputs: everything that the merge reads.
        overwrite: whether an earlier merge may be replaced; nothing else is, ever.

    Raises:
        UserError: it may not, or the working folder beside it holds something else.
    """
    where = str(output)
    check_output(output, inputs, where)
    if output.name == TOKEN_ROWS and os.path.realpath(output.parent) == os.path.realpath(run):
        what = "the output would be taken for the run's own embeddings of added tokens"
        raise UserError(what, where=where, hint="Choose another output.")
    _restore(output)
    if os.path.lexists(output):
        if not overwrite:
            hint = "Choose another with -o, or --overwrite."
            raise UserError("the output folder is already there", where=where, hint=hint)
        if not output.is_dir():
            raise UserError("the output is a file, not a folder", where=where, hint="Choose another with -o.")
        check_replaceable(output, "a merged model", _foreign_in_merged(output), where)
    partial = beside(output, "partial")
    if os.path.lexists(partial) and (not partial.is_dir() or partial.is_symlink() or _is_foreign(partial)):
        _refuse_locked(partial)
        what = f"{partial} is needed for the merge, and holds something else"
        raise UserError(what, where=where, hint="Move it away, or choose another output.")


def beside(output: Path, suffix: str) -> Path:
    """Return the name of a folder beside the output."""
    return output.with_name(f"{output.name}.{suffix}")


@contextmanager
def working_folder(partial: Path) -> Iterator[None]:
    """Create the folder and lock it against a second merge."""
    partial.mkdir(parents=True, exist_ok=True)
    lock_file = partial / LOCK
    lock = FileLock(lock_file, timeout=0)
    _acquire(lock, partial)
    try:
        yield
    finally:
        lock.release()
        lock_file.unlink(missing_ok=True)


def keep_failed(partial: Path, output: Path) -> Path:
    """Rename the folder of a failed merge to `OUTPUT.failed` and return it; an earlier failure goes."""
    failed = beside(output, "failed")
    if failed.is_dir() and not failed.is_symlink() and not _is_foreign(failed):
        shutil.rmtree(failed, ignore_errors=True)
    return partial.rename(free_name(output, "failed"))


def publish(partial: Path, output: Path) -> None:
    """Give the verified folder its name; a merge that it replaces is moved aside and removed last."""
    (partial / RESUME_STATE_NAME).unlink()
    make_loadable(partial)
    replace_folder(partial, output)


def written_files(partial: Path) -> list[str]:
    """Return the names of all files that the merge leaves."""
    names = {file.name for file in partial.iterdir()} - _OF_A_MERGE_IN_PROGRESS
    return sorted({*names, MODEL_CONFIG, REPORT_NAME})


def _acquire(lock: FileLock, partial: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError("another merge is writing to this folder", where=str(partial)) from error


def _refuse_locked(partial: Path) -> None:
    """Refuse the folder of a merge that runs, whatever it holds."""
    if _is_plain_file(partial / LOCK):
        lock = FileLock(partial / LOCK, timeout=0)
        _acquire(lock, partial)
        lock.release()


def _restore(output: Path) -> None:
    """Bring back a merge that was moved aside when the process that replaced it was killed."""
    old, partial = beside(output, "old"), beside(output, "partial")
    if os.path.lexists(output) or not old.is_dir() or not (partial / MODEL_CONFIG).is_file():
        return
    if _foreign_in_merged(old) is None:
        old.rename(output)


def _foreign_in_merged(folder: Path) -> str | None:
    """Return the name of something in a folder that no merge wrote; "" if its report is missing; None if all is."""
    try:
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None if not any(folder.iterdir()) else ""
    if not isinstance(report, dict) or not {"base", "adapters", "shards", "versions"} <= report.keys():
        return ""
    # Reports of earlier versions do not list the files.
    return _foreign(folder, set(report.get("files") or _SMALL | _shards(folder)))


def _is_foreign(folder: Path) -> bool:
    """Return whether the folder of an interrupted or failed merge holds something that no merge wrote."""
    names = {entry.name for entry in folder.iterdir()}
    if names <= {LOCK}:
        return False
    if RESUME_STATE_NAME not in names and REPORT_NAME not in names:
        return True
    code = {name for name in names if name.endswith(".py")}
    return _foreign(folder, _SMALL | _OF_A_MERGE_IN_PROGRESS | _shards(folder) | code) is not None


def _foreign(folder: Path, known: set[str]) -> str | None:
    entries = sorted(folder.iterdir())
    return next((entry.name for entry in entries if entry.name not in known or not _is_plain_file(entry)), None)


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _shards(folder: Path) -> set[str]:
    return {file.name for pattern in _SHARDS for file in folder.glob(pattern)}
