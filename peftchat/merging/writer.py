"""Write one safetensors file as a stream: header first, then the tensors' bytes in order.

Everything the header says (names, types, shapes, offsets) is known before the first weight is computed, so no tensor
has to wait in memory for another. The file has its final name only when it is complete.
"""

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

from peftchat.merging.dtypes import NAMES


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor will be: its name, type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Append the tensors of `specs`, in that order, to `path`; use as a context manager.

    Leaving the block in peace requires that every byte has come; the file is then flushed to the disk and renamed.
    Leaving it by an exception removes what was written.

    Attributes:
        digest: SHA-256 of the whole file, set when it is complete.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path = path
        self.digest = ""
        self._temporary = path.with_name(path.name + ".part")
        self._hash = hashlib.sha256()
        self._due = sum(spec.bytes for spec in specs)
        self._header = _header(specs)

    def __enter__(self) -> "ShardWriter":
        self._stream = self._temporary.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending = self._thread.submit(self._write, memoryview(self._header))
        return self

    def append(self, rows: torch.Tensor) -> None:
        """The next rows (any number, C order) of the tensor whose turn it is, in the type that the header promised.

        Hashing and writing go on beside the computation of the next rows; one block waits at most. The rows must not be
        changed afterwards.

        Raises:
            OSError: of this or the last block.
        """
        flat = rows.contiguous().reshape(-1).view(torch.uint8)
        self._due -= flat.numel()
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
                assert self._due == 0, f"{self.path.name}: {self._due} bytes differ from the header"
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
    text += b" " * (-len(text) % 8)  # the format asks that tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text
