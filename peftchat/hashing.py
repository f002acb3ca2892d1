"""Digests of files: exact ones, kept in a cache, and quick ones of samples.

The exact digest reads the whole file, in several threads: the SHA-256 of the SHA-256 of each 64 MiB. It is kept under
the file's path, size, times and inode, so a file that nobody touched is read once. The quick digest reads the header of
a safetensors file and a few kilobytes of every tensor: another model, and another version of any tensor, differ there,
while a single changed number may not.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peftchat.files import cache_root, write_text

_BLOCK = 64 << 20
_READ = 4 << 20
_SAMPLE = 4096
_APART = 1 << 20
_MAX_HEADER = 100_000_000
"""Bytes of the largest header that safetensors accepts."""

_SETTLED_NS = 2_000_000_000
"""A file that changed this shortly ago may change again within the resolution of its times, so it is not kept."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The content of a file.

    Attributes:
        bytes: its size.
        sample: the quick digest.
        exact: the exact digest; None while it is not known.
    """

    bytes: int
    sample: str
    exact: str | None = None

    def differs(self, other: "FileDigest") -> bool:
        """Return whether two contents are known to differ."""
        if self.exact is not None and other.exact is not None:
            return self.exact != other.exact
        return (self.bytes, self.sample) != (other.bytes, other.sample)


def digest_files(files: Mapping[str, Path], *, exact: bool, threads: int | None = None) -> dict[str, FileDigest]:
    """Return the digests of files by name.

    Args:
        files: name -> path.
        exact: read every byte, unless the cache knows the file; else the exact digest only if the cache knows it.
        threads: for reading; None for the number of cores, at most 8.

    Raises:
        OSError: a file cannot be read.
    """
    threads = threads or min(8, os.cpu_count() or 1)
    return {
        name: FileDigest(path.stat().st_size, _sample(path), _exact(path, threads) if exact else _known(path))
        for name, path in files.items()
    }


def damage_digest(path: Path) -> str:
    """Return a digest that a file which was cut, overwritten or filled with zeros no longer has.

    Files up to 64 MiB are read as a whole; of larger ones 4 KiB of each MiB, and the ends. Disks lose blocks of that
    size and larger ones, so little is missed, and a large checkpoint is read in seconds.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _BLOCK:
            ranges = [(start, _READ) for start in range(0, size, _READ)]
        else:
            ranges = [(0, _READ), *((start, _SAMPLE) for start in range(_READ, size, _APART)), (size - _READ, _READ)]
        for start, length in ranges:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()[:32]


def _exact(path: Path, threads: int) -> str:
    known = _known(path)
    if known is not None:
        return known
    before, now = path.stat(), time.time_ns()
    blocks = range(0, before.st_size, _BLOCK)
    whole = hashlib.sha256()
    # Opened once per block: the threads must not share a position.
    with ThreadPoolExecutor(max(1, min(threads, len(blocks)))) as pool:
        for block in pool.map(lambda start: _block(path, start), blocks):
            whole.update(block)
    digest = whole.hexdigest()
    after = path.stat()
    if (
        _identity(path, before) == _identity(path, after)
        and now - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED_NS
    ):
        _remember(path, after, digest)
    return digest


def _block(path: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = _BLOCK
        while left and (part := file.read(min(_READ, left))):
            digest.update(part)
            left -= len(part)
    return digest.digest()


def _sample(path: Path) -> str:
    """Return the digest of a header and of a few kilobytes of every tensor; of both ends of another file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for start, length in _sampled_ranges(file.read(8), path, size):
            file.seek(start)
            digest.update(start.to_bytes(8, "little") + file.read(length))
    return digest.hexdigest()[:32]


def _sampled_ranges(first: bytes, path: Path, size: int) -> Sequence[tuple[int, int]]:
    ends = [(0, min(size, 16 * _SAMPLE)), (max(0, size - 16 * _SAMPLE), 16 * _SAMPLE)]
    length = int.from_bytes(first, "little")
    if path.suffix != ".safetensors" or not 0 < length <= min(_MAX_HEADER, size - 8):
        return ends
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            tensors = sorted((name, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
            samples = [(8 + length + start, size) for start, size in (_place(*tensor) for tensor in tensors)]
        except (ValueError, KeyError, TypeError, AttributeError):
            return ends
    return [(0, 8 + length), *samples, *ends]


def _place(name: str, begin: int, end: int) -> tuple[int, int]:
    """Return which bytes of a tensor are sampled: a place of its own in each, and always the same one."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    length = min(_SAMPLE, end - begin)
    return begin + number % (end - begin - length + 1), length


def _identity(path: Path, status: os.stat_result) -> list[object]:
    return [
        _VERSION, str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino,
    ]  # fmt: skip


def _entry(path: Path) -> Path:
    return cache_root() / "digests" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _known(path: Path) -> str | None:
    """Return the exact digest that the cache has of a file nobody touched since."""
    try:
        kept = json.loads(_entry(path).read_bytes())
        return str(kept["digest"]) if kept["file"] == _identity(path, path.stat()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path: Path, status: os.stat_result, digest: str) -> None:
    # Without a cache every run reads the file again.
    with suppress(OSError):
        entry = _entry(path)
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, json.dumps({"file": _identity(path, status), "digest": digest}, ensure_ascii=True))
