"""Paths as users write them: `~`, `$VARIABLES`, and names that no file system takes."""

import os
import re
from pathlib import Path

from peftchat.errors import UserError

_VARIABLE = re.compile(r"\$(\$|\{[^}]*\}?|[A-Za-z_][A-Za-z0-9_]*)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_MOST_BYTES_OF_NAME = 255
_MOST_BYTES_OF_PATH = 4095
"""Linux's limit, without the byte that ends the text. Other systems have lower ones and report them themselves."""

_ROOM_FOR_ENDINGS = 32
"""Bytes that an output's name must leave free: a temporary name is longer than the final one."""

_ROOM_FOR_FILES = 256
"""Bytes that an output folder's path must leave free for the files in it."""


def expand_path(text: str, where: str) -> str:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` replaced; `$$` stands for `$`.

    A path that exists as it is written is that path. A text without these signs, such as a hub id, is returned as it
    is.

    Args:
        text: the path.
        where: the key or the option that it is the value of.

    Raises:
        UserError: a variable is not set or is empty, there is no such user, or no file can have that name.
    """
    check_name(text, where)
    if "$" in text and not (not text.startswith("~") and exists(text)):
        text = _VARIABLE.sub(lambda match: _value(match[1], text, where), text)
    if text.startswith("~"):
        text = _home(text, where)
    check_name(text, where)
    return text


def escape_path(path: str) -> str:
    """Return a path such that `expand_path` returns it unchanged on any machine."""
    return path.replace("$", "$$")


def check_name(text: str, where: str) -> None:
    """Check that the system can have a file of that name.

    Raises:
        UserError: it cannot.
    """
    if not text:
        raise UserError("the path is empty", where=where, hint="Give a path.")
    if "\0" in text:
        raise UserError("a path cannot contain the character NUL", where=where, hint="Remove it.")
    size = len(_encoded(text, where))
    if size > _MOST_BYTES_OF_PATH:
        what = f"the path of {size:,} bytes is longer than {_MOST_BYTES_OF_PATH:,}, the most that the system allows"
        raise UserError(what, where=where, hint="Shorten it.")
    _check_parts(text, _MOST_BYTES_OF_NAME, where)


def check_new_name(path: Path, where: str) -> None:
    """Check that a file or folder of that name can be made, with the temporary names around it.

    Raises:
        UserError: it cannot, or its name would be hard to type: it holds control characters, or blanks at its ends.
    """
    text = os.fspath(path)
    check_name(text, where)
    for part in path.parts:
        if any(ord(character) < 32 or ord(character) == 127 for character in part):
            what = f"the name {part!r} holds a line break or another control character"
            raise UserError(what, where=where, hint="Choose another name.")
        if part != part.strip() and not exists(text[: text.find(part) + len(part)]):
            raise UserError(f"the name {part!r} begins or ends with a blank", where=where, hint="Remove the blank.")
    _check_parts(path.name, _MOST_BYTES_OF_NAME - _ROOM_FOR_ENDINGS, where)
    size = len(_encoded(os.path.abspath(path), where))  # noqa: PTH100 - `absolute` keeps `..`
    if size > _MOST_BYTES_OF_PATH - _ROOM_FOR_FILES:
        what = f"the path of {size:,} bytes leaves no room for the files below it"
        raise UserError(what, where=where, hint=f"Shorten it to {_MOST_BYTES_OF_PATH - _ROOM_FOR_FILES:,} bytes.")


def exists(text: str) -> bool:
    """Return whether a text is the path of something here; a text that cannot be a path is not."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _check_parts(text: str, most: int, where: str) -> None:
    for part in Path(text).parts:
        size = len(_encoded(part, where))
        if size > most:
            what = f"the name `{part[:24]}…` has {size:,} bytes, and the file system allows {most}"
            raise UserError(what, where=where, hint="Shorten it.")


def _encoded(text: str, where: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError as error:
        character = text[error.start]
        what = f"the file system's encoding {error.encoding} has no character {character!a}"
        raise UserError(what, where=where, hint="Set LC_ALL=C.UTF-8, or choose another name.") from error


def _value(reference: str, text: str, where: str) -> str:
    """Return what stands for `$reference`."""
    if reference == "$":
        return "$"
    name = reference[1:-1] if reference.startswith("{") and reference.endswith("}") else reference
    if not _NAME.fullmatch(name):
        what = f"`${reference}` in `{text}` is not of the form $NAME or ${{NAME}}"
        raise UserError(what, where=where, hint="Write $$ for a dollar sign.")
    value = os.environ.get(name)
    if not value:
        state = "not set" if value is None else "empty"
        what = f"the environment variable {name} in `{text}` is {state}"
        raise UserError(what, where=where, hint=f"Set {name}, write the path in full, or write $$ for a dollar sign.")
    return value


def _home(text: str, where: str) -> str:
    expanded = os.path.expanduser(text)  # noqa: PTH111 - pathlib raises where this returns the text
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        what = "there is no home folder here" if user == "~" else f"there is no user `{user[1:]}` here"
        raise UserError(f"{what}, for `{text}`", where=where, hint="Write the path in full.")
    return expanded
