"""Locks of DeepSpeed's compiled kernels: a dead compiler's is removed, a living one's stays."""

from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from peftchat.training.deepspeed_kernels import remove_dead_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_cpu_adam").mkdir()
    return tmp_path / "deepspeed_cpu_adam" / "lock"


def test_a_lock_stays_while_its_process_compiles_and_goes_with_it(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert remove_dead_locks() == []
    assert lock.exists()
    assert baton.fd is not None
    # What is left of a killed process: the file, which nobody has open.
    lock_left_behind = lock.parent.parent / "deepspeed_other" / "lock"
    lock_left_behind.parent.mkdir()
    lock_left_behind.touch()
    assert remove_dead_locks() == [lock_left_behind]
    assert str(lock_left_behind) in capsys.readouterr().err.replace("\n", "")
    baton.release()
    assert not lock.exists()
    assert remove_dead_locks() == []


def test_torch_still_waits_for_the_lock_of_a_dead_process(lock: Path) -> None:
    """Once this fails, `remove_dead_locks` can go."""
    lock.touch()
    assert not FileBaton(str(lock)).try_acquire()
