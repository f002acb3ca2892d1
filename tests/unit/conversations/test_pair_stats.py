"""Statistics of pairs: lengths, what both answers have in common, answers that are nearly the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversations.problems import ReadOptions
from peftchat.conversations.stats import gather, parts_of_path
from peftchat.conversations.stats.pairs import PairStats
from peftchat.reports.stats_report import findings_of


def stats_of(path: Path, records: list[dict[str, Any]]) -> PairStats:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (part,) = gather(parts_of_path(str(path), ReadOptions(pairs=True))).parts
    assert part.pairs is not None
    assert part.as_dict()["pairs"]["pairs"] == part.pairs.pairs
    return part.pairs


def test_answers_are_compared_and_prompts_are_not(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "12345678"}, {"role": "assistant", "content": "123456"}]
    pairs = stats_of(
        tmp_path / "a.jsonl",
        [
            {"prompt": "1234", "chosen": "Because of rain", "rejected": "Because of snow!"},
            {"prompt": [*said, {"role": "user", "content": "12"}], "chosen": "abcd", "rejected": "xy"},
            {"prompt": "Hi", "chosen": "One two", "rejected": "one  TWO"},
            {"prompt": "Hi", "chosen": "a b c d e f g h i j", "rejected": "j i h g f e d c b a a"},
            {"prompt": "Hi", "chosen": "left", "rejected": "down"},
        ],
    )
    assert pairs.pairs == 5
    assert (pairs.chosen.total, pairs.rejected.total) == (15 + 4 + 7 + 19 + 4, 16 + 2 + 8 + 21 + 4)
    assert (pairs.chosen_longer, pairs.same_length) == (1, 1)
    assert pairs.longer_share == pytest.approx(1 / 4)
    # Turns are joined by a line break.
    assert pairs.prompt_characters == 4 + (8 + 1 + 6 + 1 + 2) + 3 * 2
    assert pairs.shared_characters == len("Because of ")
    assert (pairs.same_but_for_space, pairs.nearly_the_same) == (1, 1)
    assert [place.rpartition(":")[2] for place in pairs.examples] == ["3", "4"]


def test_a_file_whose_chosen_answers_are_long_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        {"prompt": f"q {n}", "chosen": f"x{n} " * (3 if n % 4 else 1), "rejected": f"y{n} z{n}"} for n in range(24)
    ]
    stats_of(path, records)
    (part,) = gather(parts_of_path(str(path), ReadOptions(pairs=True))).parts
    assert "the chosen answer is the longer one in 75 % of the pairs: length is learned too" in [
        finding.text for finding in findings_of(part)
    ]


def test_scores_that_contradict_the_choice_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    scores = [
        {"score_chosen": 8, "score_rejected": 3.5}, {"chosen_rating": 4, "rejected_rating": 4},
        {"score_chosen": 1, "score_rejected": 9}, {"chosen_score": "high", "rejected_score": "low"}, {},
    ]  # fmt: skip
    records = [{"prompt": f"q {n}", "chosen": f"x{n}", "rejected": f"y{n}", **one} for n, one in enumerate(scores)]
    pairs = stats_of(path, records)
    assert (pairs.scored, pairs.tied, pairs.scored_lower) == (3, 1, 1)
    (part,) = gather(parts_of_path(str(path), ReadOptions(pairs=True))).parts
    told = " ".join(finding.text for finding in findings_of(part))
    assert "one score for both answers in 1 (33 %)" in told and "a higher score for the rejected answer in 1" in told


def test_pairs_that_share_the_chosen_answer_are_no_duplicates(tmp_path: Path) -> None:
    """A pair is another one where its rejected answer is."""
    path = tmp_path / "a.jsonl"
    record = {"prompt": "a long enough question to be compared", "chosen": "a good answer"}
    texts = ("no idea at all, sorry about that " * 3, "ok", "ok")
    path.write_text("".join(json.dumps({**record, "rejected": text}) + "\n" for text in texts))
    (part,) = gather(parts_of_path(str(path), ReadOptions(pairs=True))).parts
    assert part.exact_duplicates == 1
    assert part.near_duplicates in (None, 0)
