"""Reading safetensors files: their headers, and tensors by rows, without a complete tensor in memory."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.models.source import WEIGHTS, WEIGHTS_INDEX, read_index, refuse_lfs_pointer

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

_QUANTIZED_DTYPES: dict[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
"""The types of quantized weights that torch has too."""

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


def read_header(file: Path, *, quantized: bool = False) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file: its tensors, in their order in the file.

    Args:
        file: the file.
        quantized: whether to accept the types of quantized weights.

    Raises:
        UserError: the file is missing, is not safetensors, is shorter or longer than its header says, or holds
            quantized weights.
    """
    refuse_lfs_pointer(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not size:
                raise _damaged(file, "it is empty")
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
    entries = [_entry(file, name, info, 8 + length, quantized=quantized) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.bytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise _damaged(file, f"{entry.name} does not begin where the tensor before it ends")
        end += entry.bytes
    if end != size:
        raise _damaged(file, f"it has {size:,} bytes, expected {end:,} by its header")
    return {entry.name: entry for entry in entries}


def _entry(file: Path, name: str, info: dict[str, Any], start: int, *, quantized: bool) -> TensorEntry:
    try:
        kind, (begin, end) = str(info["dtype"]), map(int, info["data_offsets"])
        shape = tuple(int(size) for size in info["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the header entry of {name} cannot be read") from error
    dtype = TORCH_DTYPES.get(kind) or (_QUANTIZED_DTYPES.get(kind) if quantized else None)
    if dtype is None:
        raise UserError(
            f"{name} is stored as {kind}, a quantized or packed type",
            where=str(file),
            hint="Use the 16- or 32-bit version of the model.",
        )
    entry = TensorEntry(name, file, dtype, shape, start + begin)
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
    def open(cls, folder: Path, *, quantized: bool = False) -> "SafetensorsCheckpoint":
        """Read the index and every header of a model folder.

        Like transformers, it reads the single file where there are shards too.

        Args:
            folder: the model.
            quantized: whether to accept the types of quantized weights.

        Raises:
            UserError: no safetensors weights, a missing or damaged shard, or a tensor that is not in the shard named by
                the index, or in two shards.
        """
        index = folder / WEIGHTS_INDEX
        weight_map: dict[str, str] = {}
        if (folder / WEIGHTS).is_file():
            files = [WEIGHTS]
        elif index.is_file():
            weight_map = read_index(index)
            files = list(dict.fromkeys(weight_map.values()))
        else:
            raise UserError(
                f"the folder has no safetensors weights ({WEIGHTS} or its index)",
                where=str(folder),
                hint="Save the model once with transformers' save_pretrained, which writes them.",
            )
        entries: dict[str, TensorEntry] = {}
        for name in files:
            header = read_header(folder / name, quantized=quantized)
            twice = next(iter(header.keys() & entries.keys()), None)
            if twice is not None:
                raise UserError(
                    f"{twice} is in {entries[twice].file.name} and in {name}",
                    where=str(folder),
                    hint="Download the model again.",
                )
            entries.update(header)
        for tensor, name in weight_map.items():
            if tensor not in entries or entries[tensor].file.name != name:
                raise UserError(
                    f"{tensor} is not in {name}, the file that the index names",
                    where=str(index),
                    hint="Download the shards and the index of one version of the model.",
                )
        return cls(folder, entries, tuple(files))

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
