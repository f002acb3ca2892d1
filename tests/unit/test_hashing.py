"""Digests of files: any byte changes the exact one, any tensor the quick one, and nobody trusts an old entry."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftchat import hashing
from peftchat.hashing import digest_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("PEFTCHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, **changes: torch.Tensor) -> Path:
    torch.manual_seed(0)
    tensors = {f"layer{index}": torch.randn(64, 512) for index in range(4)}
    save_file({**tensors, **changes}, str(path))
    return path


def test_every_byte_counts_in_the_exact_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_BLOCK", 50_000)
    file = write(tmp_path / "a.safetensors")
    one = digest_files({"a": file}, exact=True)["a"]
    content = bytearray(file.read_bytes())
    for place in (9, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        file.write_bytes(content)
        assert digest_files({"a": file}, exact=True)["a"].differs(one)
        content[place] ^= 1
    file.write_bytes(content)
    assert not digest_files({"a": file}, exact=True, threads=1)["a"].differs(one)


@pytest.mark.parametrize("index", range(4))
def test_a_change_of_any_one_tensor_shows_in_the_quick_digest(index: int, tmp_path: Path) -> None:
    before = digest_files({"a": write(tmp_path / "a.safetensors")}, exact=False)["a"]
    other = write(tmp_path / "b.safetensors", **{f"layer{index}": torch.ones(64, 512)})
    assert before.exact is None
    assert digest_files({"a": other}, exact=False)["a"].differs(before)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 100, b"\x05\0\0\0\0\0\0\0[1,2]xxxx", os.urandom(300_000)])
def test_files_that_are_not_safetensors_have_a_digest(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    digest = digest_files({"a": tmp_path / "a.safetensors"}, exact=True)["a"]
    assert digest.bytes == len(content)
    assert digest.exact


def test_the_cache_forgets_a_file_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_SETTLED_NS", 0)
    file = write(tmp_path / "a.safetensors")
    digest = digest_files({"a": file}, exact=True)["a"]
    assert digest_files({"a": file}, exact=False)["a"] == digest
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    # Size, inode and the time of the last change of content are as before; the system's own time is not.
    assert digest_files({"a": file}, exact=False)["a"].exact is None
    assert digest_files({"a": file}, exact=True)["a"].differs(digest)


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    digest_files({"a": write(tmp_path / "a.safetensors")}, exact=True)
    assert not list(cache.rglob("*.json"))
