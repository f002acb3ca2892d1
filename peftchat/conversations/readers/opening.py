"""Opening a data file: what its first bytes say it is, and its text unpacked, with line ends that all readers know."""

import gzip
import io
import re
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from peftchat.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_HEAD = 2**16
_PIECE_OF_ZSTD = 2**13
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_FIRST_BYTES: tuple[tuple[bytes, str, str], ...] = (
    (_GZIP, "gzip data", "Give the file a name that ends in .gz, or unpack it: gunzip."),
    (_ZSTD, "Zstandard data", "Give the file a name that ends in .zst, or unpack it: unzstd."),
    (b"BZh", "bzip2 data", "Unpack it: bunzip2."),
    (b"\xfd7zXZ\x00", "xz data", "Unpack it: unxz."),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "Unpack it."),
    (b"PK\x03\x04", "a zip archive, or an Excel file", "Unpack it, or save the table as CSV."),
    (b"PAR1", "a Parquet file", "Give the file a name that ends in .parquet."),
    (b"ARROW1", "an Arrow file", "Give the file a name that ends in .arrow."),
    (b"SQLite format 3\x00", "an SQLite database", "Export the table as CSV or JSON lines."),
    (b"%PDF-", "a PDF", "Give a file with records."),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "Save it as UTF-8: iconv -f UTF-32 -t UTF-8."),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "Save it as UTF-8: iconv -f UTF-32 -t UTF-8."),
    (b"\xff\xfe", "UTF-16 text", "Save it as UTF-8: iconv -f UTF-16 -t UTF-8."),
    (b"\xfe\xff", "UTF-16 text", "Save it as UTF-8: iconv -f UTF-16 -t UTF-8."),
    (
        b"version https://git-lfs.github.com",
        "a git-lfs pointer, not the file itself",
        "Fetch the file: git lfs pull.",
    ),
)
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)\b", re.IGNORECASE)
_XML = re.compile(rb"(\xef\xbb\xbf)?\s*<\?xml\b", re.IGNORECASE)
_PACKINGS = {".gz": (_GZIP, "gzip"), ".zst": (_ZSTD, "Zstandard")}

BrokenPacking = (EOFError, zlib.error)
"""What reading packed data raises where it is damaged or cut off."""


class _Unpacked(io.RawIOBase):
    """Unpacked data, piece by piece: what stands before a damage is given before the damage is reported."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._stream = stream
        self._most = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        try:
            data = self._stream.read1(min(len(target), self._most))  # type: ignore[attr-defined]
        except OSError as error:
            raise EOFError(str(error)) from error
        target[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _LinesOfOldMacs(io.RawIOBase):
    """A file whose lines end in CR alone, with LF instead."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        data = self._file.read(len(target)).replace(b"\r", b"\n")
        target[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_text(path: Path) -> io.BufferedReader:
    """The bytes of a text file, unpacked, whose `peek` shows the first ones.

    Raises:
        UserError: it is another kind of file.
        EOFError: its packed data ends at once (as of `BrokenPacking`).
    """
    suffix = path.suffix.lower()
    if suffix in _PACKINGS:
        _check_packing(path, *_PACKINGS[suffix])
    file = _open(path, suffix)
    try:
        head = file.peek(_HEAD)
        check_first_bytes(path, head)
    except BaseException:
        file.close()
        raise
    if b"\r" in head and b"\n" not in head and b"\r" in head.rstrip(b"\r\n\t "):
        return io.BufferedReader(_LinesOfOldMacs(file), _HEAD)
    return file


def check_first_bytes(path: Path, head: bytes, own: bytes = b"") -> None:
    """Check that the first bytes are not those of a kind of file that the reader does not read.

    Args:
        path: the file, for the message.
        head: its first bytes, unpacked.
        own: the first bytes of the reader's own kind.

    Raises:
        UserError: they are.
    """
    if own and head.startswith(own):
        return
    unpacked = _PACKINGS.get(path.suffix.lower())
    for mark, kind, hint in _FIRST_BYTES:
        if head.startswith(mark):
            if unpacked is not None and unpacked[0] == mark:
                raise UserError(f"the file is {kind} that was packed twice", where=str(path), hint="Unpack it once.")
            raise UserError(f"the file is {kind}", where=str(path), hint=hint)
    if _HTML.match(head):
        hint = "Download the file itself; such a page is an error message or a login."
        raise UserError("the file is a web page (HTML)", where=str(path), hint=hint)
    if _XML.match(head):
        raise UserError("the file is XML", where=str(path), hint="Export it as JSON lines or CSV.")
    if head[257:262] == b"ustar":
        raise UserError("the file is a tar archive", where=str(path), hint="Unpack it: tar xf.")
    if len(head) >= 64 and not any(head):
        hint = "Fetch the file again: an interrupted download leaves such a file."
        raise UserError("the file begins with nothing but NUL bytes", where=str(path), hint=hint)
    # Text of western languages in UTF-16 without a mark at its start has a NUL in every second byte.
    start = head[:64]
    if len(start) >= 8 and (not any(start[::2]) or not any(start[1::2])):
        hint = "Save it as UTF-8: iconv -f UTF-16LE -t UTF-8."
        raise UserError("the file is UTF-16 text", where=str(path), hint=hint)


def _check_packing(path: Path, mark: bytes, kind: str) -> None:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(mark):
        return
    check_first_bytes(path, head)
    raise UserError(
        f"the file is not {kind}, although its name ends in {path.suffix}",
        where=str(path),
        hint=f"Take {path.suffix} off its name if it is plain text, or fetch the file again.",
    )


def _open(path: Path, suffix: str) -> io.BufferedReader:
    if suffix == ".gz":
        return io.BufferedReader(_Unpacked(cast("BinaryIO", gzip.open(path, "rb")), _HEAD), _HEAD)
    if suffix == ".zst":
        # Arrow brings the decompressor along, and unlike zstandard's own reader it notices a file that is cut off.
        import pyarrow

        # Arrow fills each piece, so a damage costs the piece that it is in.
        return io.BufferedReader(_Unpacked(pyarrow.CompressedInputStream(str(path), "zstd"), _PIECE_OF_ZSTD), _HEAD)
    return cast("io.BufferedReader", path.open("rb", buffering=_HEAD))


def as_text(file: IO[bytes]) -> io.TextIOWrapper:
    """The file as text with its line ends as they are; bytes that are not UTF-8 become lone surrogates."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
