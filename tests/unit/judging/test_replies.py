"""Replies are read as a person would read them, and nothing is invented."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat.errors import UserError
from peftchat.judging.judge_prompts import own_prompt, read_prompt_file
from peftchat.judging.replies import Scores, read_scores, read_verdict


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("8 9\nBecause.", (8, 9)),
        ("8.5, 9", (8.5, 9)),
        ("**7 3**\n", (7, 3)),
        ("8/10 9/10\n…", (8, 9)),
        ("8 and 9", (8, 9)),
        ("Both are fine.\n\n7 4", (7, 4)),
        ("Assistant 1: 7\nAssistant 2: 4\nBecause", (7, 4)),
        ("Assistant A: 7/10, Assistant B: 4/10", (7, 4)),
        ("Scores:\nAssistant 1: 1 (wrong)\nAssistant 2: 8 (small slip)\nDone", (1, 8)),
        ("In conclusion, the scores are (1, 5) for Assistant 1 and Assistant 2, respectively.", (1, 5)),
        ("", None),
        ("8", None),
        ("8 9 10", None),
        ("I give 8 to the first and 9 to the second.", None),
        ("0 9", None),
        ("8 11", None),
        ("-1 9 points", None),
        ("First 3 5 things", None),
        ("Text\n8 9\nor\n9 8", None),
        ("Assistant 1: 7\nAssistant 1: 4", None),
    ],
)
def test_two_scores(reply: str, expected: tuple[float, float] | None) -> None:
    found = read_scores(reply, 1, 10)
    assert (found and (found.first, found.second)) == expected


@given(st.text(alphabet="8 9,.\nA[]:assint-12/", max_size=60))
def test_no_score_is_invented(reply: str) -> None:
    found = read_scores(reply, 1, 10)
    if found is not None:
        for score in (found.first, found.second):
            assert f"{score:g}" in reply.replace(".0", "") or f"{score}" in reply
            assert 1 <= score <= 10


@given(
    st.floats(1, 8).map(lambda value: round(value, 1)), st.floats(1, 8).map(lambda value: round(value, 1)), st.text()
)
def test_what_follows_the_first_line_changes_nothing(first: float, second: float, rest: str) -> None:
    assert read_scores(f"{first:g} {second:g}\n{rest}", 1, 8) == Scores(first, second)


def test_every_score_of_real_reviews(shared_data: Path) -> None:
    """By the rule of the tool that asked for them: the first line is two numbers. Six reviews have them below."""
    later = []
    for file in ("gpt4_reviews_80a.jsonl", "gpt4_reviews_80b.jsonl"):
        for line in (shared_data / "judge" / file).read_text().splitlines():
            reply = json.loads(line)["text"]
            head = reply.split("\n")[0].replace(",", " ").split()
            found = read_scores(reply, 1, 10)
            assert found is not None
            if len(head) == 2:
                assert [found.first, found.second] == list(map(float, head))
            else:
                later.append((found.first, found.second))
    # Read by eye.
    assert later == [(1, 8), (1, 3), (1, 5), (10, 6), (10, 1), (10, 4)]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("So [[A]]", "first"), ("[[b]]", "second"), ("[[C]]", "tie"), ("[[A]] or [[B]]", None), ("A wins", None)],
)
def test_verdicts(reply: str, expected: str | None) -> None:
    assert read_verdict(reply) == expected


def test_texts_with_names_of_the_template_stay_as_they_are() -> None:
    (system, user) = own_prompt("code").fill("{answer_a}?", "{question} {answer_b}", "{0} {x}")
    assert "[Question]\n{answer_a}?\n" in user["content"] and "\n{question} {answer_b}\n" in user["content"]
    assert "from 1 (no code" in user["content"] and "to 8 " in user["content"] and system["role"] == "system"


def test_the_prompts_of_other_tools(shared_data: Path) -> None:
    old = read_prompt_file(shared_data / "judge/vicuna_prompts.jsonl", "coding", (1, 8))
    text = old.fill("Q?", "FIRST", "SECOND")[-1]["content"]
    assert text.startswith("[Question]\nQ?\n") and text.index("FIRST") < text.index("SECOND") and "{" not in text
    assert (old.form, old.low, old.high) == ("scores", 1, 8)
    new = read_prompt_file(shared_data / "judge/fastchat_judge_prompts.jsonl", "pair-v2", None)
    assert new.form == "verdict" and "{" not in new.fill("Q?", "FIRST", "SECOND")[-1]["content"]
    with pytest.raises(UserError, match=r"no prompt of the file is named `pair-v9`\. It has: "):
        read_prompt_file(shared_data / "judge/fastchat_judge_prompts.jsonl", "pair-v9", None)
