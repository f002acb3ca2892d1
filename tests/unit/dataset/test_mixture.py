"""Mixtures drawn again in each epoch: exact shares, a turn for everybody, and always the same number of packs."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from peftchat.chat_template.chat_format import make_format
from peftchat.dataset.cache import EncodedSplit, encode_splits
from peftchat.dataset.epochs import EpochPacks
from peftchat.dataset.mixture import Mixture, SourceShare, data_notes
from peftchat.recipe import Recipe, load_recipe
from tests.support.data import write_small_talk
from tests.support.recipes import write_recipe
from tests.support.tokenizers import save_tokenizer

WEIGHTS = st.floats(0.01, 3.5)
SOURCES = st.lists(st.tuples(WEIGHTS, st.integers(0, 40)), min_size=1, max_size=4)


def mixture_of(sources: list[tuple[float, int]], seed: int = 0) -> Mixture:
    return Mixture(tuple(SourceShare.of(f"{n}.jsonl", *source) for n, source in enumerate(sources)), seed)


@given(SOURCES, st.integers(0, 3), st.integers(1, 30))
def test_everyone_has_a_turn_before_anyone_has_the_next(
    sources: list[tuple[float, int]], seed: int, epochs: int
) -> None:
    mixture = mixture_of(sources, seed)
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        drawn = Counter(mixture.draw(epoch).tolist())
        assert drawn.total() == mixture.per_epoch
        seen.update(drawn)
        start = 0
        for weight, size in sources:
            numbers = range(start, start + size)
            start += size
            # Within an epoch a conversation comes as often as the weight says, rounded down or up.
            assert {drawn[number] for number in numbers} <= {int(weight), int(weight) + 1}
            counts = [seen[number] for number in numbers] or [0]
            assert max(counts) - min(counts) <= 1
            # The share is exact but for the rounding to whole conversations, and never none at all.
            share = sum(drawn[number] for number in numbers)
            assert abs(share - weight * size) <= 1
            assert share or not size


def test_the_draw_depends_on_the_epoch_alone() -> None:
    """A run that is resumed in its 40th epoch asks for that one first."""
    sources = [(0.3, 70), (1.7, 11), (0.01, 500)]
    inorder = mixture_of(sources)
    draws = [inorder.draw(epoch).tolist() for epoch in range(40)]
    for epoch in (39, 0, 17, 17, 3):
        assert mixture_of(sources).draw(epoch).tolist() == inorder.draw(epoch).tolist() == draws[epoch]
    assert len({tuple(draw) for draw in draws}) == 40
    assert mixture_of(sources, seed=1).draw(0).tolist() != draws[0]


@pytest.mark.parametrize("capacity", [64, None])
def test_each_epoch_has_the_same_number_of_packs(capacity: int | None) -> None:
    lengths = np.random.default_rng(1).integers(3, 65, 300)
    epochs = EpochPacks(mixture_of([(0.4, 200), (1.3, 100)]), lengths, capacity)
    left_out = 0
    for epoch in range(60):
        packs = epochs.of_epoch(epoch)
        assert len(packs) == len(epochs)
        drawn, packed = Counter(epochs.mixture.draw(epoch).tolist()), Counter(packs.examples.tolist())
        assert packed <= drawn
        assert (drawn - packed).total() == epochs.left_out
        # What is left out is told; the epochs that the number was made for have everything.
        assert epochs.left_out == 0 or epoch >= 16
        left_out += epochs.left_out
        sums = [int(lengths[pack].sum()) for pack in packs]
        assert sums == epochs.lengths_of(epoch).tolist()
        assert all(packs)
        assert max(sums) <= (capacity or 64)
    assert left_out < 60 * 0.05 * len(epochs)


def test_a_late_epoch_leaves_the_emptiest_packs_out() -> None:
    """Where many examples were drawn at once, only the first epoch decides about the number."""
    lengths = np.array([60] * 4 + [30] * 4)
    epochs = EpochPacks(mixture_of([(0.5, 8)]), lengths, 64)
    epochs._number, epochs._last = 1, None
    for epoch in range(4):
        packs = epochs.of_epoch(epoch)
        assert len(packs) == 1
        assert epochs.left_out == 4 - len(packs[0])


def encoded(tmp_path: Path, **data: object) -> tuple[Recipe, dict[str, EncodedSplit]]:
    tokenizer = save_tokenizer(tmp_path / "model")
    paths = [write_small_talk(tmp_path / f"{name}.jsonl", count, seed=count) for name, count in (("a", 30), ("b", 20))]
    train = [{"path": str(paths[0]), "weight": 0.5}, {"path": str(paths[1]), "weight": 2}]
    file = write_recipe(tmp_path / "r.yaml", tokenizer, paths[0], data={"train": train, "resample": True, **data})
    recipe = load_recipe(file, to_train=False).recipe
    chat = make_format("starchat", None, AutoTokenizer.from_pretrained(recipe.model.name))
    return recipe, dict(encode_splits(recipe, chat))


def test_all_conversations_are_encoded_once(tmp_path: Path, own_cache: None) -> None:
    recipe, splits = encoded(tmp_path)
    assert splits["train"].stats.by_source == [30, 20]
    sources = [example.source for example in splits["train"].store]
    assert len(set(sources)) == 50
    epochs = EpochPacks.of(recipe, splits["train"])
    assert epochs is not None
    for epoch in range(3):
        by_file = Counter(Path(sources[n].rsplit(":", 1)[0]).stem for n in epochs.of_epoch(epoch).examples)
        assert by_file == {"a": 15, "b": 40}
    (note,) = data_notes(recipe, "train", splits["train"].stats)
    assert "55 examples (15 of 30 of " in note
    assert "a.jsonl (weight 0.5); all 20 of " in note
    assert note.endswith("b.jsonl twice)")


def test_what_is_held_out_is_drawn_once_and_a_limit_stands_before_the_draw(tmp_path: Path, own_cache: None) -> None:
    recipe, splits = encoded(tmp_path, eval_fraction=0.2, max_train_samples=30)
    train, held_out = splits["train"], splits["eval"]
    assert len(train.store) == 30 == sum(train.stats.by_source)
    sources = Counter(example.source for example in held_out.store)
    # Of the second source each conversation counts twice, of the first one about half of them are left out.
    assert {count for source, count in sources.items() if "b.jsonl" in source} == {2}
    assert not {example.source for example in train.store} & set(sources)
    assert list(data_notes(recipe, "eval", held_out.stats)) == list(held_out.stats.reading_notes())
