"""Two answers side by side: what both begin with, and each from where they part."""

from pathlib import Path

from peftchat.chat_template.loss_mask import TurnPart
from peftchat.recipe import load_recipe
from peftchat.reports.mask import ShownExample, ShownToken, inspect_mask
from peftchat.reports.mask_pairs import pairs_of
from tests.support.models import small_model
from tests.support.pairs import pair_recipe, write_labels


def example(text: str) -> ShownExample:
    tokens = [ShownToken(letter, (ord(letter),), "user", TurnPart.CONTENT, False, False) for letter in text]
    return ShownExample("a.jsonl:1", tuple(tokens), (), len(tokens))


def test_a_pair_is_shown_from_where_its_answers_part() -> None:
    (one, other) = pairs_of(
        ("chosen", "rejected"), [example(text) for text in ("abcd", "abxyz", "same", "same and more")]
    )
    assert ["".join(token.text for token, _ in part) for part in (one.prompt, other.prompt)] == ["ab", "same"]
    sides = [
        [(name, "".join(token.text for token, _ in tokens)) for name, _, tokens in pair.sides] for pair in (one, other)
    ]
    assert sides == [[("chosen", "cd"), ("rejected", "xyz")], [("chosen", ""), ("rejected", " and more")]]


def test_the_answer_beside_a_labeled_one_is_shown_as_not_trained_and_not_counted(tmp_path: Path) -> None:
    data = write_labels(tmp_path / "labels.jsonl", 6)
    recipe = load_recipe(pair_recipe(tmp_path, small_model(), data, None, objective="kto")).recipe
    report = inspect_mask(recipe, "train", lambda done: None)
    assert report.summary.headline.startswith("train: 6 examples, ")
    rows = list(report.as_json(None))
    shown = list(report.shown(3))
    assert len(rows) == 12 and len(shown) == 6
    for number, row in enumerate(rows):
        trains = any(label != -100 for label in row["labels"])
        assert row["side"] == ("answer", "other")[number % 2] and trains == (number % 2 == 0)
    assert [example.trained > 0 for example in shown] == [True, False] * 3
