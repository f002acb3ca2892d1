"""Writing safetensors files by rows, without a complete tensor in memory."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from peftchat.models.safetensors_files import TORCH_DTYPES

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
