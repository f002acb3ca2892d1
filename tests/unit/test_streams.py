"""Standard streams: what becomes of text that a stream has no bytes for."""

import io
import os
import subprocess
import sys

import pytest

from peftchat import streams


@pytest.mark.parametrize(
    ("encoding", "errors", "text", "written"),
    [
        ("ascii", "strict", "Grüße …", b"Gr??e ?"),
        ("latin-1", "strict", "Grüße …", "Grüße ?".encode("latin-1")),
        ("utf-8", "strict", "half a pair: \ud83d", b"half a pair: ?"),
        # The locale C: a file name of unknown bytes goes out as it came in, other characters are replaced.
        ("ascii", "surrogateescape", os.fsdecode(b"a\xff") + "…", b"a\xff?"),
        ("utf-8", "strict", "日本語", "日本語".encode()),
    ],
)
def test_standard_output_takes_any_text(
    monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, text: str, written: bytes
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    streams.prepare_streams()
    stream.write(text)
    stream.flush()
    assert stream.buffer.getvalue() == written  # type: ignore[attr-defined]


def test_a_closed_stream_keeps_its_number() -> None:
    """Otherwise the first file that is opened becomes standard output, and a library prints into it."""
    lines = (
        "import sys",
        "from peftchat.streams import prepare_streams",
        "prepare_streams()",
        "sys.stderr.write(str(open('/dev/null').fileno()))",
    )
    command = f'{sys.executable} -c "{"; ".join(lines)}" >&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert int(done.stderr) > 2
