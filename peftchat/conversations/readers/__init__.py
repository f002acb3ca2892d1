"""From a path to records: the reader for each kind of file."""

from collections.abc import Callable, Iterator
from pathlib import Path

from peftchat.conversations.problems import ProblemLog, RawRecord
from peftchat.conversations.readers.finding import FoundFiles, check_no_hub_keys, ending_of, find_data, find_files
from peftchat.conversations.readers.json_values import read_json_values
from peftchat.conversations.readers.jsonl import read_jsonl
from peftchat.conversations.readers.tables import read_arrow, read_csv, read_parquet

Reader = Callable[[Path, int, ProblemLog], Iterator[RawRecord]]

_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json_values,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""File ending, without that of its packing -> reader."""


def reader_for(path: Path) -> Reader | None:
    """The reader for a file's ending, None where there is none."""
    ending = ending_of(path)
    return None if ending is None else _READERS[ending.removesuffix(".gz").removesuffix(".zst")]


__all__ = ["FoundFiles", "Reader", "check_no_hub_keys", "find_data", "find_files", "reader_for"]
