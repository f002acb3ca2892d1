"""What every test shares: no network, no threads of torch to share two cores with, and a few data sets and models."""

import os
import signal

# Read by libraries while they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A suite that is started in the background ignores these, and so would every process that it starts.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

PROJECT = Path(__file__).resolve().parents[1]

# How long an example takes depends on who else computes here.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return 0, which is this process, where the command line names files; they seldom pay for the workers."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if named and not any(Path(argument).is_dir() for argument in config.args):
        return 0
    return os.cpu_count() or 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left with one of them when the others are done.

    A file stays in one worker (`--dist=loadfile`).
    """
    slow = {item.path for item in items for name in ("real", "distributed") if item.get_closest_marker(name)}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real conversations that are not part of the project; tests that need them skip where they are absent."""
    named = os.environ.get("PEFTCHAT_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not (folder / "oasst_trees_en_60.jsonl").is_file():
        pytest.skip(f"no real conversations in {folder}; set PEFTCHAT_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """A base model of three layers that has learned to write, with its tokenizer; to be read alone."""
    from tests.support.pretrained import pretrained_model

    return pretrained_model()


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A base model of 260,032 parameters that others have trained; tests that need it skip where it is absent."""
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


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 24 conversations, to train on; to be read alone."""
    from tests.support.data import write_small_talk

    return write_small_talk(tmp_path_factory.mktemp("conversations") / "train.jsonl")


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of seven conversations, to evaluate on; to be read alone."""
    from tests.support.data import write_small_talk

    return write_small_talk(tmp_path_factory.mktemp("conversations") / "eval.jsonl", 7, seed=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test's encoded examples in the test's folder."""
    monkeypatch.setenv("PEFTCHAT_CACHE", str(tmp_path / "cache"))
