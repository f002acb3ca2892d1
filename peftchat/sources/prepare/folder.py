"""A folder that appears whole or not at all, and the files in it."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import orjson

from peftchat.conversation import Conversation
from peftchat.errors import UserError
from peftchat.sources.prepare.card import SideCount
from peftchat.sources.problems import Problem

_KEPT_OF_RAW_ROW = 64 * 1024


@contextmanager
def appearing_folder(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder` that takes its name if the block ends well, and goes if it does not.

    Raises:
        InputError: `folder` is a file or holds something, or the disk does not let us write.
    """
    cure = "Give a folder that does not exist yet, or an empty one."
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError("the output folder is not empty", where=str(folder), cure=cure)
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is a file, not a folder", where=str(folder), cure=cure)
    draft = folder.parent / f".{folder.name}.{os.getpid()}.partial"
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


class DialogueFile:
    """A `.jsonl` file in messages form that counts what it holds."""

    def __init__(self, path: Path, count: SideCount) -> None:
        self.count = count
        self._file = path.open("wb")

    def write(self, conversation: Conversation) -> None:
        """Append one dialogue: its messages, and where it came from."""
        row = {"messages": conversation.as_dicts(), "source": conversation.source}
        self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self.count.add(conversation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Quarantine:
    """The bad rows, each with its place and reason; the file is made with the first of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def write(self, problem: Problem, raw: bytes | None) -> None:
        """Append one row; of a very long one only the start is kept, and said to be."""
        if self._file is None:
            self._file = self._path.open("wb")
        text = (raw or b"")[:_KEPT_OF_RAW_ROW].decode(errors="backslashreplace")
        row = {
            "where": problem.where,
            "kind": problem.kind,
            "detail": printable(problem.detail),
            "row": text,
            "cut": len(raw or b"") > _KEPT_OF_RAW_ROW,
        }
        self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

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
