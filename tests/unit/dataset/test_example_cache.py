"""Encoded examples are kept: used again, safe when two runs start at once, and never wrong after a kill."""

import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.chat_template.examples import ExampleBatch, ExampleWriter
from peftchat.dataset.cache import encode_splits, load_splits
from peftchat.errors import UserError
from peftchat.files import cache_root
from peftchat.hashing import digest_files
from peftchat.recipe import Recipe, load_recipe
from peftchat.training.kept_choices import read_kept
from tests.support.cli import Started, start
from tests.support.data import CONVERSATIONS, write_conversations
from tests.support.recipes import write_recipe
from tests.support.tokenizers import save_tokenizer

PREPARE = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from peftchat.chat_template.chat_format import make_format
from peftchat.recipe import load_recipe
from peftchat.dataset.cache import encode_splits
recipe = load_recipe(Path(sys.argv[1]), to_train=False).recipe
chat = make_format("starchat", None, AutoTokenizer.from_pretrained(recipe.model.name))
calls = []
print("ready", flush=True)
sys.stdin.readline()
def progress(done):
    calls.append(done)
    print(done, flush=True)
rows = encode_splits(recipe, chat, progress)["train"]
print("done", len(rows.store), int(rows.store.lengths.sum()), len(calls), flush=True)
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    tokenizer = save_tokenizer(tmp_path / "model")
    return write_recipe(tmp_path / "r.yaml", tokenizer, write_conversations(tmp_path / "d.jsonl", CONVERSATIONS * 1500))


def of(recipe_file: Path, *overrides: str) -> tuple[Recipe, ChatFormat]:
    recipe = load_recipe(recipe_file, overrides, to_train=False).recipe
    return recipe, make_format("starchat", None, AutoTokenizer.from_pretrained(recipe.model.name))


def begin(recipe_file: Path) -> Started:
    """Start encoding in a process of its own, which waits for `go`."""
    process = start("-c", PREPARE, recipe_file)
    assert process.next_line() == "ready"
    return process


def go(process: Started) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def cache() -> Path:
    return Path(os.environ["PEFTCHAT_CACHE"]) / "examples"


def test_a_second_run_encodes_nothing(recipe_file: Path) -> None:
    recipe, chat = of(recipe_file)
    calls: list[int] = []
    first = encode_splits(recipe, chat, calls.append)["train"]
    assert calls[-1] == len(first.store) == 4500
    (folder,) = (path for path in cache().iterdir() if path.is_dir())
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    calls.clear()
    second = load_splits(recipe, chat)["train"]
    assert not calls and {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert second.stats == first.stats
    for number in (0, 1, 4499):
        np.testing.assert_array_equal(first.store[number].ids, second.store[number].ids)


@pytest.mark.parametrize(
    "change", ["chat.system=x", "data.max_length=77", "chat.loss_on=everything", "data.eval_fraction=0.2"]
)
def test_another_setting_is_another_entry(recipe_file: Path, change: str) -> None:
    write_conversations(recipe_file.parent / "d.jsonl", CONVERSATIONS)
    encode_splits(*of(recipe_file))
    encode_splits(*of(recipe_file, change))
    assert sum(path.is_dir() for path in cache().iterdir()) == 2


def test_another_content_under_the_same_name_is_another_entry(recipe_file: Path) -> None:
    source = recipe_file.parent / "d.jsonl"
    write_conversations(source, CONVERSATIONS)
    time_before = source.stat()
    first = encode_splits(*of(recipe_file))["train"]
    text = source.read_text().replace("four", "5our")
    source.write_text(text)
    os.utime(source, ns=(time_before.st_atime_ns, time_before.st_mtime_ns))
    second = encode_splits(*of(recipe_file))["train"]
    assert first.store.path != second.store.path
    assert any(not np.array_equal(one.ids, other.ids) for one, other in zip(first.store, second.store, strict=True))


def test_two_runs_at_once_build_one_entry(recipe_file: Path) -> None:
    processes = [begin(recipe_file) for _ in range(2)]
    for process in processes:
        go(process)
    ends = [process.communicate()[0].splitlines()[-1].split() for process in processes]
    assert all(end[0] == "done" for end in ends)
    assert ends[0][1:3] == ends[1][1:3]
    # One encoded, the other waited for it and read.
    assert sorted(int(end[3]) > 0 for end in ends) == [False, True]
    assert sum(path.is_dir() for path in cache().iterdir()) == 1


def test_a_killed_build_leaves_nothing_that_is_used(recipe_file: Path) -> None:
    process = begin(recipe_file)
    go(process)
    while process.next_line() not in ("1024", "2048", "3072"):
        pass
    process.kill()
    process.wait()
    time.sleep(0.1)
    left = [path for path in cache().iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".tmp"]
    rows = encode_splits(*of(recipe_file))["train"]
    assert len(rows.store) == 4500
    assert [path.suffix for path in cache().iterdir() if path.is_dir()] == [""]
    stats = json.loads((rows.store.path.parent / "train.json").read_text())
    assert stats["examples"] == 4500 and stats["tokens"] == int(rows.store.lengths.sum())


def test_keys_that_leave_end_tokens_only_are_refused_and_single_examples_counted(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "model")
    call = {"type": "function", "function": {"name": "find", "arguments": {"id": 7}}}
    calling = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "tool_calls": [call]}]}
    plain = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    for records in ([calling], [calling, plain]):
        data = tmp_path / f"{len(records)}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        file = write_recipe(tmp_path / "r.yaml", tokenizer, data)
        recipe, chat = of(file, "chat.train_tool_calls=false")
        chat = make_format("chatml", None, chat.tokenizer)
        if len(records) == 1:
            with pytest.raises(UserError, match="only the tokens that end answers would be trained"):
                load_splits(recipe, chat)
        else:
            notes = list(load_splits(recipe, chat)["train"].stats.reading_notes())
            assert "only end tokens are trained in 1 of 2 examples" in notes


def test_a_full_disk_is_told_with_the_cure(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCHAT_CACHE", str(tmp_path / "cache"))
    write = ExampleWriter.write
    room = iter(range(2))

    def full(self: ExampleWriter, batch: ExampleBatch) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, batch)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"the disk is full: .* MB") as failure:
        patch.setattr(ExampleWriter, "write", full)
        encode_splits(*of(recipe_file))
    assert "PEFTCHAT_CACHE" in str(failure.value)
    assert [path.suffix for path in (tmp_path / "cache" / "examples").iterdir()] == [".lock"]
    assert len(encode_splits(*of(recipe_file))["train"].store)


@pytest.mark.parametrize("users", ["", "relative", "/absolute"])
def test_an_empty_or_relative_cache_of_the_user_counts_as_none(
    users: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEFTCHAT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", users)
    assert cache_root() == (Path("/absolute") if users == "/absolute" else tmp_path / ".cache") / "peftchat"


@pytest.mark.parametrize("has_home", [True, False])
def test_a_cache_that_cannot_be_written_is_told_with_the_cure(
    has_home: bool, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of a container often has no home folder, or one that is not theirs; a file stands for that here."""
    recipe, chat = of(recipe_file)
    monkeypatch.delenv("PEFTCHAT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if has_home:
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(UserError, match="encoded data cannot be kept") as failure:
        encode_splits(recipe, chat)
    assert "PEFTCHAT_CACHE" in str(failure.value)
    # Everything else that is kept there can be done without.
    assert digest_files({"data": recipe_file}, exact=True) and read_kept({}) is None
