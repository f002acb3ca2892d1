"""Which files a path means: splits in names, links, patterns, saved data sets; and what is told of the rest."""

import json
from pathlib import Path

import datasets
import pytest

from peftchat.conversations import ProblemLog, read_conversations
from peftchat.conversations.readers import find_data, find_files
from peftchat.errors import UserError


def write(path: Path, text: str = "hello") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompt": text, "completion": "answer"}) + "\n")
    return path


def names(folder: Path | str, split: str | None = None) -> list[str]:
    return [file.name for file in find_files(str(folder), split) or ()]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("corpus_train_v2.jsonl", "train"),
        ("train01.jsonl", "train"),
        ("pets.validation.jsonl", "eval"),
        ("pets-val-3.jsonl", "eval"),
        ("PETS_DEV.JSONL", "eval"),
        ("heldOutEvalSet.jsonl", "eval"),
        ("pets test.jsonl", "test"),
        ("part/testing/0001.jsonl", "test"),
        ("my-valid-set/0001.jsonl", "eval"),
        ("latest.jsonl", ""),
        ("contest-protest.jsonl", ""),
        ("trainer_notes.jsonl", ""),
        ("devices/evaluated.jsonl", ""),
    ],
)
def test_a_split_is_named_anywhere_in_a_name_as_a_word(tmp_path: Path, name: str, split: str) -> None:
    write(tmp_path / name)
    write(tmp_path / "train-other.jsonl")
    found = find_data(str(tmp_path), "train")
    assert str(tmp_path / "train-other.jsonl") in map(str, found.files or ())
    assert (tmp_path / name in (found.files or ())) == (split == "train")
    assert (str(tmp_path / name) in found.unread) == (split == "")
    if split not in ("", "train"):
        assert names(tmp_path, split) == [Path(name).name]


def test_a_name_of_two_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "pets_test_and_train.jsonl")
    with pytest.raises(UserError, match="two splits: test and train"):
        names(tmp_path)
    write(tmp_path / "b" / "eval" / "train.jsonl")
    with pytest.raises(UserError, match="two splits: eval and train"):
        names(tmp_path / "b")


def test_a_folder_with_a_test_file_alone_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "pets_test.jsonl")
    with pytest.raises(UserError, match=r"splits found: test \(pets_test.jsonl\)"):
        names(tmp_path)
    assert names(tmp_path / "pets_test.jsonl") == ["pets_test.jsonl"]


def test_files_that_are_not_read_are_told_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    for name in ("b.jsonl.bz2", "notes.txt", "README.md", "LICENSE", ".gitattributes", "deep/script.py"):
        write(tmp_path / name)
    log = ProblemLog(strict=True)
    assert len(list(read_conversations(tmp_path, problems=log))) == 1
    assert sorted(Path(file).name for file in log.unread) == ["b.jsonl.bz2", "notes.txt", "script.py"]
    assert any("notes.txt is not read" in sentence for sentence in log.sentences())
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"no data files; not read: b.jsonl.bz2, script.py, notes.txt"):
        names(tmp_path)


def test_a_pattern_is_its_matches_and_keeps_to_a_split(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.json", "deep/d.jsonl"):
        write(tmp_path / "plain" / name)
    assert names(tmp_path / "plain" / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "plain" / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "d.jsonl"]
    assert names(tmp_path / "plain" / "[bc].*") == ["b.jsonl", "c.json"]
    with pytest.raises(UserError, match="no file matches"):
        names(tmp_path / "plain" / "*.parquet")
    for name in ("x-train.jsonl", "x-test.jsonl"):
        write(tmp_path / "named" / name)
    assert names(tmp_path / "named" / "*.jsonl") == ["x-train.jsonl"]
    assert names(tmp_path / "named" / "*-test*.jsonl") == ["x-test.jsonl"]
    assert names(tmp_path / "*" / "x-*.jsonl", "test") == ["x-test.jsonl"]


def test_linked_folders_are_read_once_and_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.jsonl")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "z.jsonl").symlink_to(tmp_path / "elsewhere" / "a.jsonl")
    found = find_data(str(folder))
    assert found.files == [folder / "linked" / "a.jsonl"]
    assert list(found.unread) == [str(folder / "z.jsonl")]
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="leads nowhere"):
        find_data(str(folder))
    with pytest.raises(UserError, match="leads nowhere"):
        find_data(str(folder / "gone.jsonl"))


def test_a_saved_data_set_is_its_files_and_not_its_caches(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}", "completion": "answer"} for number in range(9)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"what a transformation left")
    log = ProblemLog(strict=True)
    found = [one.messages[0].content for one in read_conversations(tmp_path / "one", problems=log)]
    assert found == [row["prompt"] for row in rows]
    assert list(log.unread) == [str(tmp_path / "one" / "cache-0123.arrow")]
    datasets.DatasetDict({"train": saved, "test": saved.select(range(2))}).save_to_disk(tmp_path / "two")
    assert len(list(read_conversations(tmp_path / "two"))) == 9
    assert len(list(read_conversations(tmp_path / "two", split="test"))) == 2
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state\.json lists data-00001-of-00002\.arrow"):
        list(read_conversations(tmp_path / "one"))


def test_keys_of_hub_data_sets_are_refused_for_a_local_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="`subset: main` belongs to hub data sets"):
        read_conversations(path, subset="main")
    with pytest.raises(UserError, match="`revision: v2` belongs to hub data sets"):
        read_conversations(path, revision="v2")
