"""Reading and writing safetensors files by rows, without a complete tensor in memory."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.models.source import WEIGHTS, WEIGHTS_INDEX

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in a safetensors header -> torch's dtype. Packed and 8-bit float types are left out: a base with them is
quantized, and an adapter cannot be merged into it."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch's dtype -> name in a safetensors header."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes the tensors of `specs`, in that order, to a new file `path`; use as a context manager.

    At the end of the block every byte must have been appended; the file is flushed to the disk and renamed. If the
    block raises, the unfinished file is removed.

    Attributes:
        digest: SHA-256 of the file, set when it is complete.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path = path
        self.digest = ""
        self._temporary = path.with_name(path.name + ".part")
        self._hash = hashlib.sha256()
        self._remaining = sum(spec.bytes for spec in specs)
        self._header = _header(specs)

    def __enter__(self) -> "ShardWriter":
        self._stream = self._temporary.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending = self._thread.submit(self._write, memoryview(self._header))
        return self

    def append(self, rows: torch.Tensor) -> None:
        """Append the next rows (any number, C order), in the dtype of their spec.

        Rows are hashed and written by another thread, one block at a time. They must not be changed afterwards.

        Raises:
            OSError: this block or the previous one cannot be written.
        """
        flat = rows.contiguous().reshape(-1).view(torch.uint8)
        self._remaining -= flat.numel()
        self._pending.result()
        if flat.numel():
            self._pending = self._thread.submit(self._write, flat.numpy().data)

    def _write(self, view: memoryview) -> None:
        self._hash.update(view)
        while view:
            view = view[self._stream.write(view) :]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = False
        try:
            self._thread.shutdown()
            if kind is None:
                self._pending.result()
                assert self._remaining == 0, f"{self.path.name}: {self._remaining} bytes differ from the header"
                os.fsync(self._stream.fileno())
                complete = True
        finally:
            self._stream.close()
            if not complete:
                self._temporary.unlink(missing_ok=True)
        if complete:
            self.digest = self._hash.hexdigest()
            self._temporary.rename(self.path)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.bytes
        table[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires that tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Location of one tensor: `offset` counts bytes from the start of the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file: its tensors, in their order in the file.

    Raises:
        UserError: the file is missing, is not safetensors, or is shorter or longer than its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(file, "the header is incomplete")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise UserError("the file is missing", where=str(file), hint="Copy or download the model again.") from error
    except ValueError as error:
        raise _damaged(file, "the header cannot be read") from error
    if not isinstance(header, dict):
        raise _damaged(file, "the header cannot be read")
    header.pop("__metadata__", None)
    entries = [_entry(file, name, info, 8 + length) for name, info in header.items()]
    entries.sort(key=lambda entry: entry.offset)
    end = max((entry.offset + entry.bytes for entry in entries), default=8 + length)
    if end != size:
        raise _damaged(file, f"it has {size:,} bytes, expected {end:,} by its header")
    return {entry.name: entry for entry in entries}


def _entry(file: Path, name: str, info: dict[str, Any], start: int) -> TensorEntry:
    try:
        kind, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the header entry of {name} cannot be read") from error
    if kind not in TORCH_DTYPES:
        raise UserError(
            f"{name} is stored as {kind}, a quantized or packed type",
            where=str(file),
            hint="Merge into the 16- or 32-bit version of the base model.",
        )
    entry = TensorEntry(name, file, TORCH_DTYPES[kind], shape, start + begin)
    if entry.bytes != end - begin:
        raise _damaged(file, f"the size of {name} does not match its shape {list(shape)}")
    return entry


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"damaged safetensors file: {why}", where=str(file), hint="Copy or download it again.")


def read_rows(entry: TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Read rows `start` to `stop` of a tensor, in its stored dtype, into new memory.

    Raises:
        UserError: the file ends early.
    """
    stop = entry.rows if stop is None else stop
    shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
    rows = torch.empty(shape, dtype=entry.dtype)
    if rows.numel() == 0:
        return rows
    view = rows.reshape(-1).view(torch.uint8).numpy().data
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.offset + start * (entry.bytes // entry.rows))
        while view:
            count = stream.readinto(view)
            if not count:
                raise _damaged(entry.file, f"it ends inside {entry.name}")
            view = view[count:]
    return rows


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """All tensors of a model folder: `entries` by name, `files` in the order of the index."""

    folder: Path
    entries: dict[str, TensorEntry]
    files: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "SafetensorsCheckpoint":
        """Read the index and every header of a model folder.

        Raises:
            UserError: no safetensors weights, a missing or damaged shard, or a tensor that is not in the shard named by
                the index.
        """
        index = folder / WEIGHTS_INDEX
        if index.is_file():
            weight_map = _read_index(index)
            files = tuple(dict.fromkeys(weight_map.values()))
        elif (folder / WEIGHTS).is_file():
            weight_map, files = {}, (WEIGHTS,)
        else:
            raise UserError(
                f"the folder has no safetensors weights ({WEIGHTS} or its index)",
                where=str(folder),
                hint="Save the model once with transformers' save_pretrained, which writes them.",
            )
        entries: dict[str, TensorEntry] = {}
        for name in files:
            entries.update(read_header(folder / name))
        for tensor, name in weight_map.items():
            if tensor not in entries or entries[tensor].file.name != name:
                raise UserError(f"{tensor} is not in {name}, the file that the index names", where=str(index))
        return cls(folder, entries, files)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())

    def of_file(self, name: str) -> Iterator[TensorEntry]:
        """Return the tensors of one shard, in their order in the file."""
        return (entry for entry in self.entries.values() if entry.file.name == name)

    def fingerprint(self) -> list[list[object]]:
        """Return name, size and modification time of every shard, which change when the base is replaced."""
        stats = [(name, (self.folder / name).stat()) for name in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(name) for tensor, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("the index of the shards cannot be read", where=str(index)) from error
