"""Fixtures of the tests that train variants: one cache and one trainer per test file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.variants import VariantTrainer


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encode the conversations once for all tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCHAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def train(
    pretrained: Path, conversations: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> VariantTrainer:
    """Return a trainer that shares its runs among the tests of a file."""
    return VariantTrainer(pretrained, conversations, held_out, tmp_path_factory.mktemp("runs"))
