"""Digests of examples: content and order count, files and places do not."""

from pathlib import Path

import numpy as np
import pytest

from peftchat.chat_template.examples import EncodedExample, ExampleBatch, ExampleStore, ExampleWriter
from peftchat.dataset.digests import example_digests
from peftchat.runs.fingerprints import DataDigest, describe_data, read_data_digests, write_data_digests

EXAMPLES = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]), ([3, 2, 1], [0, 1, 1])]


def store(path: Path, examples: list[tuple[list[int], list[int]]], source: str = "a.jsonl") -> ExampleStore:
    encoded = [
        EncodedExample(np.array(ids, np.int32), np.array(tags, np.uint8), f"{source}:{number}", 0)
        for number, (ids, tags) in enumerate(examples, start=1)
    ]
    with ExampleWriter(path) as writer:
        writer.write(ExampleBatch.of(encoded[:2]))
        writer.write(ExampleBatch.of(encoded[2:]))
    return ExampleStore(path)


def test_the_place_of_an_example_does_not_count(tmp_path: Path) -> None:
    one = example_digests(store(tmp_path / "a.arrow", EXAMPLES))
    other = example_digests(store(tmp_path / "b.arrow", [*EXAMPLES[2:], *EXAMPLES[:2]], source="moved.jsonl"))
    assert one.tolist() == [*other[1:].tolist(), int(other[0])]
    assert len(set(one.tolist())) == 3
    assert example_digests(ExampleStore(tmp_path / "a.arrow")).tolist() == one.tolist()
    assert (tmp_path / "a.digests1.npy").exists()


@pytest.mark.parametrize(
    "changed",
    [
        ([1, 2, 4], [0, 1, 1]),
        ([2, 1, 3], [0, 1, 1]),
        ([1, 2, 3], [0, 1, 0]),
        ([1, 2], [0, 1]),
        ([1, 2, 3, 0], [0, 1, 1, 0]),
    ],
)
def test_ids_tags_and_length_count(changed: tuple[list[int], list[int]], tmp_path: Path) -> None:
    one = example_digests(store(tmp_path / "a.arrow", EXAMPLES))
    other = example_digests(store(tmp_path / "b.arrow", [changed, *EXAMPLES[1:]]))
    assert (one != other).tolist() == [True, False, False]
    assert DataDigest.of(one) != DataDigest.of(other)
    words, first = describe_data("train", one, other)
    assert words == "train data: 1 of 3 conversations are new or changed, and 1 of 3 are gone"
    assert first == 0


def test_another_order_is_called_that(tmp_path: Path) -> None:
    one = example_digests(store(tmp_path / "a.arrow", EXAMPLES))
    assert "in another order" in describe_data("train", one, one[::-1])[0]
    assert "another number" in describe_data("train", one, one[[0, 1, 2, 2]])[0]
    assert describe_data("train", None, one)[1] is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}"])
def test_a_damaged_file_of_digests_is_left_out(content: bytes, tmp_path: Path) -> None:
    write_data_digests(tmp_path / "a.npz", {"train": np.arange(3, dtype=np.uint64)})
    assert read_data_digests(tmp_path / "a.npz")["train"].tolist() == [0, 1, 2]
    (tmp_path / "a.npz").write_bytes(content)
    assert read_data_digests(tmp_path / "a.npz") == {}
