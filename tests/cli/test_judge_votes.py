"""`peftchat judge` with a file of blind votes."""

import json
from pathlib import Path

import pytest

from peftchat.conversation import Message
from peftchat.web.votes import WINNERS, BlindRound, VoteFile, Winner
from tests.support.in_process import peftchat_in_process


def vote(path: Path, left: str, right: str, winner: Winner) -> None:
    turns = [Message("user", "Hi"), Message("assistant", "Hello")]
    VoteFile(path).add(BlindRound(left, right, turns, turns).decide(winner))


def test_votes_are_reported_with_their_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "votes.jsonl"
    for winner in (*["model_a"] * 9, *WINNERS[1:]):
        vote(path, "runs/tuned", "base", winner)
    done = peftchat_in_process(capsys, "judge", path, "--json")
    said = json.loads(done.stdout)
    (pair,) = said["pairs"]
    assert (said["votes"], pair["model"], pair["other"]) == (12, "base", "runs/tuned")
    assert (pair["wins"], pair["losses"], pair["ties"]) == (1, 9, 2)
    assert pair["share"] == pytest.approx(2 / 12)
    assert pair["interval"][0] < 2 / 12 < pair["interval"][1] < 0.5
    shown = peftchat_in_process(capsys, "judge", path)
    assert "17%" in shown.stdout and "do not tell" not in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("none.jsonl",), "there is no such file"),
        (("votes.jsonl", "-o", "judged"), "judged already"),
        (("talk.jsonl",), "the line is no vote"),
        (("votes.jsonl", "talk.jsonl"), "--judge"),
    ],
)
def test_what_is_no_file_of_votes_is_refused(
    arguments: tuple[str, ...], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    vote(tmp_path / "votes.jsonl", "one", "two", "tie")
    Path("talk.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    done = peftchat_in_process(capsys, "judge", *arguments)
    assert done.returncode == 2
    assert what in done.stderr
