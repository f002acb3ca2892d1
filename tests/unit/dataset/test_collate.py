"""Batches: the same tokens and labels in every layout, and packing and storage of examples."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from peftchat.chat_template.examples import EncodedExample, ExampleBatch, ExampleStore, ExampleWriter
from peftchat.chat_template.loss_mask import LossOn, TurnPart, token_tag
from peftchat.conversation import ROLES
from peftchat.dataset.collator import BatchLayout, ChatCollator
from peftchat.dataset.packing import efficiency, pack

LAYOUTS: tuple[BatchLayout, ...] = get_args(BatchLayout)
POLICIES: tuple[LossOn, ...] = get_args(LossOn)
PAD = 3
"""Also an id that examples hold, the end token's: labels must not depend on it."""


def random_rows(count: int, seed: int = 0, longest: int = 40) -> list[EncodedExample]:
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(draw.integers(1, longest))
        values = [
            token_tag(TurnPart(draw.integers(5)), (None, *ROLES)[draw.integers(5)], last_answer=bool(draw.integers(2)))
            for _ in range(length)
        ]
        ids = draw.integers(0, 20, length).astype(np.int32)
        rows.append(EncodedExample(ids, np.array(values, np.uint8), f"é{number}.jsonl:{number}", number % 3))
    return rows


def write(path: Path, batches: Sequence[Sequence[EncodedExample]]) -> ExampleStore:
    with ExampleWriter(path) as writer:
        for batch in batches:
            writer.write(ExampleBatch.of(batch))
    return ExampleStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    rows = random_rows(60)
    return write(tmp_path_factory.mktemp("rows") / "rows.arrow", [rows[:7], rows[7:8], [], rows[8:]])


def learns(value: int, policy: LossOn) -> bool:
    """The policies, written out for one code."""
    if policy == "everything":
        return True
    parts = (TurnPart.CONTENT, TurnPart.END) if policy != "answers_and_headers" else tuple(TurnPart)
    lasts = (True,) if policy == "last_answer" else (False, True)
    return value in [token_tag(part, "assistant", last_answer=last) for part in parts for last in lasts]


def one_by_one(row: EncodedExample, policy: LossOn) -> list[tuple[int, int, int]]:
    """(id, label, position) of each token, one at a time."""
    found = []
    for place, (token, value) in enumerate(zip(row.ids.tolist(), row.token_tags.tolist(), strict=True)):
        found.append((token, token if place and learns(value, policy) else -100, place))
    return found


def collator(store: ExampleStore, policy: LossOn, layout: BatchLayout, **options: Any) -> ChatCollator:
    return ChatCollator(store, loss_on=policy, layout=layout, pad_token_id=PAD, **options)


@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_token_its_label_and_its_position(
    store: ExampleStore, policy: LossOn, layout: BatchLayout, multiple: int | None
) -> None:
    packs = [[0, 5, 9], [1], [2, 3]] if layout != "padded" else [[0], [5], [9], [1]]
    batch = collator(store, policy, layout, pad_to_multiple_of=multiple)([{"examples": numbers} for numbers in packs])
    lines = [[number for numbers in packs for number in numbers]] if layout == "varlen" else packs
    assert len(batch["input_ids"]) == len(lines)
    longest = max(sum(len(store[number].ids) for number in line) for line in lines)
    width = batch["input_ids"].shape[1]
    assert longest <= width < longest + (multiple or 1) and width % (multiple or 1) == 0
    for place, line in enumerate(lines):
        expected = [token for number in line for token in one_by_one(store[number], policy)]
        ids, labels = batch["input_ids"][place].tolist(), batch["labels"][place].tolist()
        padding = width - len(expected)
        assert ids == [token for token, _, _ in expected] + [PAD] * padding
        assert labels == [label for _, label, _ in expected] + [-100] * padding
        if layout == "padded":
            assert batch["attention_mask"][place].tolist() == [1] * len(expected) + [0] * padding
        else:
            positions = batch["position_ids"][place].tolist()
            assert positions == [position for _, _, position in expected] + list(range(padding))
    assert ("attention_mask" in batch) == (layout == "padded") != ("position_ids" in batch)
    places = [place for numbers in packs for number in numbers for _, _, place in one_by_one(store[number], policy)]
    assert int(batch["real_tokens"]) == len(places)
    assert int(batch["attended_pairs"]) == sum(place + 1 for place in places)


@pytest.mark.parametrize("policy", POLICIES)
def test_watched_tokens_are_counted(store: ExampleStore, policy: LossOn) -> None:
    watched = [3, 7, 11, 99]
    numbers = list(range(len(store)))
    batch = collator(store, policy, "varlen", tracked_token_ids=watched)([{"examples": numbers}])
    seen, useful = [0] * len(watched), [0] * len(watched)
    for number in numbers:
        tokens = one_by_one(store[number], policy)
        for place, (token, _, _) in enumerate(tokens):
            for slot, wanted in enumerate(watched):
                seen[slot] += token == wanted
                useful[slot] += token == wanted and any(label != -100 for _, label, _ in tokens[place + 1 :])
    assert batch["tracked_counts"].tolist() == [seen, useful]
    assert seen[0] > useful[0] > 0 and seen[3] == 0


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[int]:
    """What is left free in each sequence, looking through all of them for each example."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, room in enumerate(free) if room >= length]
        if fitting:
            free[min(fitting, key=lambda place: free[place])] -= length
        else:
            free.append(capacity - length)
    return free


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_every_example_once_and_are_as_few_as_best_fit_makes(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(5.5, 1.0, 1500), 0, 2048).astype(np.int64)
    packs = pack(lengths, 2048, seed)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(lengths[rows].sum() <= 2048 for rows in packs)
    assert sorted(2048 - lengths[rows].sum() for rows in packs) == sorted(best_fit_decreasing(lengths.tolist(), 2048))
    assert efficiency(packs, lengths, 2048) == lengths.sum() / (len(packs) * 2048) >= 0.97


def test_packs_depend_on_the_seed_and_on_nothing_else() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    assert list(pack(lengths, 512, 1)) == list(pack(lengths.copy(), 512, 1))
    assert sorted(map(sorted, pack(lengths, 512, 1))) != sorted(map(sorted, pack(lengths, 512, 2)))


def test_edges_of_packing() -> None:
    none = np.zeros(0, np.int64)
    assert list(pack(none, 8, 0)) == [] and efficiency([], none, 8) == 0.0
    assert [sorted(rows) for rows in pack(np.array([8, 8]), 8, 0)] in ([[0], [1]], [[1], [0]])
    with pytest.raises(ValueError, match="9 tokens does not fit into 8"):
        pack(np.array([9]), 8, 0)


def same(row: EncodedExample, other: EncodedExample) -> bool:
    arrays = np.array_equal(row.ids, other.ids) and np.array_equal(row.token_tags, other.token_tags)
    types = row.ids.dtype == other.ids.dtype == np.int32 and row.token_tags.dtype == other.token_tags.dtype == np.uint8
    return arrays and types and (row.source, row.special_token_text) == (other.source, other.special_token_text)


def test_the_store_gives_back_what_was_written(store: ExampleStore) -> None:
    rows = random_rows(60)
    assert len(store) == 60
    assert store.lengths.tolist() == [len(row.ids) for row in rows]
    assert all(same(store[place], row) for place, row in enumerate(rows))
    assert all(same(row, other) for row, other in zip(store, rows, strict=True))
    copied = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 1_000
    assert all(same(row, other) for row, other in zip(copied, rows, strict=True))


@pytest.mark.parametrize("index", [-1, 60, 1_000])
def test_examples_that_are_not_there(store: ExampleStore, index: int) -> None:
    with pytest.raises(IndexError, match=f"example {index} of 60"):
        store[index]


def test_many_batches_and_empty_examples(tmp_path: Path) -> None:
    rows = random_rows(300, seed=1)
    rows[17] = EncodedExample(np.zeros(0, np.int32), np.zeros(0, np.uint8), "", 0)
    found = write(tmp_path / "many.arrow", [[row] for row in rows])
    assert all(same(row, other) for row, other in zip(found, rows, strict=True))


@pytest.mark.parametrize("batches", [[], [[]]])
def test_an_empty_store(tmp_path: Path, batches: list[list[EncodedExample]]) -> None:
    found = write(tmp_path / "empty.arrow", batches)
    assert len(found) == 0 and list(found) == [] and found.lengths.tolist() == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_packs_of_a_batch_are_a_batch_of_their_own(layout: BatchLayout, store: ExampleStore) -> None:
    collator = ChatCollator(store, loss_on="answers", layout=layout, pad_token_id=PAD)
    packs = [{"examples": [3]}, {"examples": [9]}, {"examples": [4]}]
    whole, two = collator(packs), collator(packs[:2])
    assert collator.keep_first(whole, 3) is whole
    kept = collator.keep_first(whole, 2)
    assert kept.keys() == two.keys()
    assert all(np.array_equal(kept[name], two[name]) for name in two)
    none = collator.keep_first(whole, 0)
    assert (none["labels"] < 0).all() and not none["real_tokens"] and len(none["examples"]) == 0
