"""Failed writes: the system's number, whichever library has met it."""

import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftchat.training.failed_writes import disk_error

LIMIT = 20_000


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def by_torch(file: Path) -> None:
    torch.save({"a": torch.ones(LIMIT)}, file)


def by_safetensors(file: Path) -> None:
    save_file({"a": torch.ones(LIMIT)}, file)


@pytest.mark.parametrize("write", [by_torch, by_safetensors])
def test_a_file_that_grows_too_large_is_named_as_such(
    write: Callable[[Path], None], small_files: None, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:
        write(tmp_path / "file")
    found = disk_error(caught.value, tmp_path)
    assert found is not None and found.errno == errno.EFBIG and found.filename == str(tmp_path)


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no archive")
    with pytest.raises(RuntimeError) as caught:
        torch.jit.load(tmp_path / "file")
    assert disk_error(caught.value, tmp_path) is None
    assert disk_error(ValueError("unexpected pos"), tmp_path) is None
    assert disk_error(FileNotFoundError(errno.ENOENT, "No such file"), tmp_path) is None
