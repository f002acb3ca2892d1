"""Labeled answers in files: prepared, read again, and told where their weights are out of balance."""

import json
from pathlib import Path

import pytest

from peftchat.conversations import ReadOptions, read_conversations
from peftchat.conversations.prepare import PrepareOptions, prepare
from peftchat.dataset.labels import label_notes
from peftchat.recipe import Recipe
from tests.support.data import read_json_lines


def test_prepared_labels_are_read_as_they_were(tmp_path: Path) -> None:
    """An answer with both labels stays, as what people disagree about; a repeated one goes."""
    hello = {"prompt": "Hi", "completion": "Hello!", "label": True}
    records = [
        hello,
        {**hello, "label": False},
        hello,
        {**hello, "label": "maybe"},
        {"prompt": "Hi", "completion": "a"},
    ]
    records += [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 2, "note": n} for n in range(8)]
    source = tmp_path / "labels.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    card = prepare(str(source), tmp_path / "clean", PrepareOptions(labels=True, eval_fraction=0.3))
    assert card.problems == {"wrong_type": 1, "missing_field": 1} and card.skipped["duplicate"] == 1
    found = {}
    for name in ("train", "eval"):
        for one in read_conversations(tmp_path / "clean" / f"{name}.jsonl", options=ReadOptions(labels=True)):
            found[one.messages[0].content, one.messages[-1].content, one.label] = one.columns.get("note")
    expected = {("Hi", "Hello!", True): None, ("Hi", "Hello!", False): None}
    assert found == {**expected, **{(f"q{n}", f"a{n}", bool(n % 2)): n for n in range(8)}}
    quarantined = [line["where"] for line in read_json_lines(tmp_path / "clean" / "quarantine.jsonl")]
    assert quarantined == [f"{source}:4", f"{source}:5"]


@pytest.mark.parametrize(
    ("labels", "kto", "words"),
    [
        ([True] * 3, {}, "all 3 answers are labeled good"),
        ([True] * 6 + [False] * 2, {}, "6 good and 2 bad answers weigh 3 to 1; the paper advises 1 to 1.33, as with "
         "kto.undesirable_weight: 2.2"),
        ([True] * 2 + [False] * 6, {"undesirable_weight": 1.0}, "kto.desirable_weight: 3"),
        ([True] * 6 + [False] * 2, {"undesirable_weight": 2.25}, None),
        ([True] * 5 + [False] * 5, {}, None),
        ([], {}, None),
    ],
)  # fmt: skip
def test_weights_out_of_balance_are_told(labels: list[bool], kto: dict[str, float], words: str | None) -> None:
    recipe = Recipe.model_validate(
        {"model": {"name": "base"}, "data": {"train": [{"path": "a.jsonl"}]}, "objective": "kto", "kto": kto,
         "method": "lora", "output_dir": "run"}
    )  # fmt: skip
    found = list(label_notes(recipe, labels))
    assert found == [] if words is None else len(found) == 1 and words in found[0]
