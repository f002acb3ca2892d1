"""What is told about the data of a recipe: leaks, files left aside, greetings; and what is refused."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peftchat.chat_template.chat_format import make_format
from peftchat.dataset.cache import EncodedSplit, load_splits
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from tests.support.data import write_conversations
from tests.support.recipes import write_recipe
from tests.support.tokenizers import save_tokenizer


def talk(start: int, end: int) -> list[list[tuple[str, str]]]:
    return [[("user", f"question {number}"), ("assistant", f"answer {number}")] for number in range(start, end)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(tmp_path: Path, tokenizer: Path, train: str, /, **data: object) -> dict[str, EncodedSplit]:
    path = write_recipe(tmp_path / "r.yaml", tokenizer, tmp_path / train, data=data)
    recipe = load_recipe(path, to_train=False).recipe
    return dict(load_splits(recipe, make_format("starchat", None, AutoTokenizer.from_pretrained(tokenizer))))


def test_eval_conversations_that_are_trained_on_are_told_with_their_places(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    write_conversations(tmp_path / "a.jsonl", talk(0, 30))
    write_conversations(tmp_path / "b.jsonl", [*talk(28, 40), *talk(29, 30)])
    found = load(tmp_path, tokenizer_folder, "a.jsonl", eval=[{"path": str(tmp_path / "b.jsonl")}])
    assert list(found["eval"].stats.reading_notes()) == [
        f"3 of 13 eval conversations are also trained on ({tmp_path}/b.jsonl:1 is {tmp_path}/a.jsonl:29, "
        f"{tmp_path}/b.jsonl:2 is {tmp_path}/a.jsonl:30)."
    ]
    assert not list(found["train"].stats.reading_notes())
    limited = load(tmp_path, tokenizer_folder, "a.jsonl", eval=[{"path": str(tmp_path / "b.jsonl")}],
                   max_train_samples=28)  # fmt: skip
    assert not list(limited["eval"].stats.reading_notes())


def test_files_that_are_not_read_are_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "data").mkdir()
    write_conversations(tmp_path / "data" / "train.jsonl", talk(0, 3))
    write_conversations(tmp_path / "data" / "more.jsonl", talk(3, 6))
    (note,) = load(tmp_path, tokenizer_folder, "data")["train"].stats.reading_notes()
    assert note == f"{tmp_path}/data/more.jsonl is not read: its name has no split, and others have one."


def test_a_greeting_is_told_and_an_empty_eval_split_says_why(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_conversations(
        tmp_path / "a.jsonl", [[("user", "Hello there"), ("assistant", f"answer {number}")] for number in range(200)]
    )
    (note,) = load(tmp_path, tokenizer_folder, "a.jsonl", eval_fraction=0.2)["eval"].stats.reading_notes()
    assert note.startswith("100% of the conversations start with 'Hello there'")
    write_conversations(tmp_path / "b.jsonl", [[("user", "Hello there"), ("assistant", "Hello")]] * 5)
    with pytest.raises(UserError, match="No conversation is held out: all 5 start with the same user message"):
        load(tmp_path, tokenizer_folder, "b.jsonl", eval_fraction=0.2)


@pytest.mark.parametrize("truncation", ["turns", "drop", "split"])
def test_a_set_that_is_mostly_too_long_is_refused(tmp_path: Path, tokenizer_folder: Path, truncation: str) -> None:
    long = [[("user", "why?"), ("assistant", "because " * 300)]]
    write_conversations(tmp_path / "a.jsonl", [*talk(0, 4), *long * 5])
    with pytest.raises(UserError, match=r"5 of 9 conversations have more tokens than data.max_length: 64.*a.jsonl:5"):
        load(tmp_path, tokenizer_folder, "a.jsonl", max_length=64, truncation=truncation)
    write_conversations(tmp_path / "a.jsonl", [*talk(0, 5), *long * 4])
    found = load(tmp_path, tokenizer_folder, "a.jsonl", max_length=64, truncation=truncation)
    assert found["train"].stats.dropped == {"too_long": 4}


@pytest.mark.parametrize("bad", [False, True])
def test_conversations_behind_a_limit_are_counted(tmp_path: Path, tokenizer_folder: Path, bad: bool) -> None:
    write_conversations(tmp_path / "a.jsonl", talk(0, 30))
    write_conversations(tmp_path / "b.jsonl", talk(30, 35))
    if bad:
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write("not json\n")
    found = load(tmp_path, tokenizer_folder, "a.jsonl", eval=[{"path": str(tmp_path / "b.jsonl")}],
                 max_train_samples=12, max_eval_samples=3)  # fmt: skip
    assert found["train"].stats.examples == 12
    counted, *others = found["train"].stats.reading_notes()
    assert counted == "left out: 18 conversations behind `data.max_train_samples`"
    assert [f"{tmp_path}/a.jsonl:31: not JSON" in line for line in others] == [True] * bad
    assert found["eval"].stats.left_out == {"max_eval_samples": 2}


def test_what_rules_of_the_recipe_leave_out_is_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [*talk(0, 40), [*talk(40, 41)[0], ("user", "and then?")]]
    write_conversations(tmp_path / "a.jsonl", rows)
    source = {"path": str(tmp_path / "a.jsonl"), "weight": 0.5}
    stats = load(tmp_path, tokenizer_folder, "a.jsonl", train=[source])["train"].stats
    told = list(stats.reading_notes())
    assert f"left out: {41 - stats.examples} conversations left out by the weight of their source" in told
    assert "changed: 1 times an unanswered user turn at the end taken off" in told
