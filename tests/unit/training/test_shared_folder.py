"""Run folders of several processes: parts of one checkpoint never lie apart unnoticed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from peftchat import files
from peftchat.errors import UserError, VerificationError
from peftchat.runs.checkpoint import Checkpoint
from peftchat.training.shared_folder import check_shared


@pytest.fixture(autouse=True)
def seen_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "APPEARS_SECONDS", 0.3)


def check(folders: list[Path]) -> list[str | None]:
    """Let a thread stand for each process; return the error of each."""
    store = HashStore()

    def one(rank: int) -> str | None:
        try:
            check_shared(folders[rank], store, rank, len(folders))
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(one, range(len(folders))))


def test_processes_that_see_one_folder_pass_and_leave_nothing_in_it(tmp_path: Path) -> None:
    link = tmp_path / "another name"
    link.symlink_to(tmp_path / "run")
    assert check([tmp_path / "run", tmp_path / "run", link]) == [None, None, None]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_with_a_folder_of_its_own_is_told_by_all(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first, *others = check([here, here, there])
    assert first is not None and others == [first, first]
    assert "process 2 does not see the run folder of process 0" in first
    assert str(here) in first and str(there) in first and "(1 of 3 processes)" in first
    assert list(here.iterdir()) == [] and not there.exists()


def test_a_checkpoint_with_a_part_on_another_machine_never_counts_as_complete(tmp_path: Path) -> None:
    here, there = (Checkpoint.at_step(tmp_path / name, 4) for name in ("here", "there"))
    here.begin()
    (here.path / "rng_state_0.pth").write_bytes(b"state")
    there.path.mkdir(parents=True)
    (there.path / "rng_state_1.pth").write_bytes(b"state")
    with pytest.raises(VerificationError, match=r"lacks rng_state_1\.pth, which another process has written"):
        here.mark_complete([{}, {}], {}, written=[*here.names(), *there.names()])
    assert not here.is_complete
    # As a network file system shows it later.
    (here.path / "rng_state_1.pth").write_bytes(b"state")
    here.mark_complete([{}, {}], {}, written=[*here.names(), *there.names()])
    assert here.is_complete and set(here.record()["files"]) == {"rng_state_0.pth", "rng_state_1.pth"}
