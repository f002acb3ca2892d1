"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real conversations that are not part of the project; tests that need them skip where they are absent."""
    named = os.environ.get("PEFTCHAT_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not (folder / "oasst_trees_en_60.jsonl").is_file():
        pytest.skip(f"no real conversations in {folder}; set PEFTCHAT_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A real base model of 260,032 parameters."""
    folder = shared_data.parent / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no small model in {folder}")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real 135M model, fetched once and kept in the project's cache."""
    from peftchat.errors import UserError
    from peftchat.models.demo import ensure_demo_model

    try:
        return ensure_demo_model(PROJECT / ".cache" / "smollm2-135m")
    except UserError as error:
        pytest.skip(f"the 135M model cannot be fetched: {error}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded rows of a test stay in the test's folder."""
    monkeypatch.setenv("PEFTCHAT_CACHE", str(tmp_path / "cache"))
