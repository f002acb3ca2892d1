"""What the module of a tool says about it."""

from collections.abc import Callable
from dataclasses import dataclass

from peftchat.importing.draft import Draft
from peftchat.importing.rules import Table
from peftchat.importing.source_file import SourceFile


def names(text: str) -> frozenset[str]:
    """Return the words of a text, as keys."""
    return frozenset(text.split())


def _as_it_is(source: SourceFile) -> SourceFile:
    return source


def _anything(source: SourceFile) -> None:
    return None


@dataclass(frozen=True)
class Tool:
    """Another tool whose configurations are read.

    Attributes:
        name: its name for `--from`.
        title: its name as people write it.
        table: what becomes of each key.
        marks: first steps of keys that tell its files from those of others.
        finish: deals with keys that depend on others, and with the tool's own defaults.
        prepare: what is done to a file before its lines are read, such as following references.
        not_a_training: why a file of this tool trains nothing, or None where it does.
    """

    name: str
    title: str
    table: Table
    marks: frozenset[str]
    finish: Callable[[Draft], None]
    prepare: Callable[[SourceFile], SourceFile] = _as_it_is
    not_a_training: Callable[[SourceFile], str | None] = _anything
