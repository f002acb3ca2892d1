"""`peftchat web` without a browser: who may come in, edits and branches, votes, what is kept, tags as text."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat.conversation import Message
from peftchat.conversations import ProblemLog, read_sources
from peftchat.conversations.problems import ReadOptions
from peftchat.conversations.reading import read_conversations
from peftchat.errors import UserError
from peftchat.recipe import DataEntry
from peftchat.serving.tool_calls import read_tools
from peftchat.web.access import check_access
from peftchat.web.chat_session import ChatSession
from peftchat.web.kept_files import KeptFiles
from peftchat.web.shown_turns import read_tags, show_tags, show_turns, turn_at
from peftchat.web.votes import WINNERS, BlindRound, VoteFile, new_round, tally

# Access


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "myhost", "127.0.0.1.example"])
def test_an_address_that_others_reach_needs_a_password(host: str) -> None:
    with pytest.raises(UserError, match="no password"):
        check_access(host, None, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_only_this_machine_reaches_a_loopback_address(host: str) -> None:
    access = check_access(host, None, None)
    assert "*" not in access.allowed_hosts
    assert access.url.startswith(f"http://{host}:")
    assert not access.accepts("anyone", "")


def test_the_password_decides_and_not_the_name() -> None:
    access = check_access("0.0.0.0", None, "né-secret")
    assert access.accepts("ann", "né-secret")
    assert not access.accepts("ann", "ne-secret")
    assert not access.accepts("", "")
    with pytest.raises(UserError, match="at least 8"):
        check_access("127.0.0.1", None, "short")


def test_a_taken_port_is_refused_by_name_and_avoided_otherwise() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: the port cannot be taken"):
            check_access("127.0.0.1", port, None)
    assert check_access("127.0.0.1", port, None).port == port


# Conversation


def talk(*texts: str) -> ChatSession:
    session = ChatSession()
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        session.ask(question)
        session.answer(answer)
    return session


def test_what_an_edit_replaces_stays_as_a_branch() -> None:
    session = talk("one", "first", "two", "second")
    assert session.edit(0, "uno")
    assert [turn.content for turn in session.turns] == ["uno"]
    session.answer("primo")
    assert not session.edit(1, "better")
    assert [turn.content for turn in session.turns] == ["uno", "better"]
    session.current = 0
    assert [turn.content for turn in session.turns] == ["one", "first", "two", "second"]
    # An answer is corrected in place: what follows stays.
    session.edit(1, "corrected")
    assert [turn.content for turn in session.turns] == ["one", "corrected", "two", "second"]
    assert len(session.branches) == 4


def test_retry_and_undo_go_back_to_a_question() -> None:
    session = talk("one", "first", "two", "second")
    session.retry()
    assert session.waits
    assert session.turns[-1].content == "two"
    assert session.withdraw() == "two"
    assert session.undo() == "one"
    assert session.turns == []
    assert session.undo() == ""
    with pytest.raises(UserError, match="no question"):
        session.retry()


def test_mistakes_leave_the_conversation_as_it_is() -> None:
    session = talk("one", "first")
    before = session.turns.copy()
    for mistake in (lambda: session.ask("  "), lambda: session.edit(0, " "), lambda: session.edit(9, "x")):
        with pytest.raises(UserError):
            mistake()
    session.ask("two")
    with pytest.raises(UserError, match="no answer yet"):
        session.ask("three")
    with pytest.raises(UserError, match="does not end with an answer"):
        session.as_record()
    session.withdraw()
    assert session.turns == before


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"type": "function"}]', '[{"name": ""}]'])
def test_tools_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="Tools"):
        read_tools(text)


def test_no_tools_are_none() -> None:
    assert read_tools(" ") is read_tools(None) is read_tools("[]") is None


# Kept files


def test_a_kept_conversation_is_read_as_it_was(tmp_path: Path) -> None:
    session = talk("one", "<think>hm</think>first")
    session.system, session.tools = "Be brief.", read_tools('[{"name": "find", "parameters": {"limit": 1.50}}]')
    kept = KeptFiles(tmp_path / "chats", [])
    assert "example 1" in kept.keep_example(session.as_record())
    assert "already" in kept.keep_example(session.as_record())
    (read,) = read_sources([DataEntry(path=str(tmp_path / "chats/examples.jsonl"))], problems=ProblemLog(strict=True))
    assert read.messages == (
        Message("system", "Be brief."), Message("user", "one"), Message("assistant", "first", reasoning="hm"),
    )  # fmt: skip
    assert read.tools is not None
    assert "1.50" in read.tools


def test_a_vote_survives_and_names_who_was_where(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path, [])
    blind = BlindRound("x", "y")
    with pytest.raises(UserError, match="not both"):
        blind.decide("model_a")
    for name, turns in blind.sides():
        turns += [Message("user", "who?"), Message("assistant", f"I am {name}")]
    kept.votes.add(blind.decide("model_b", system="Speak.", judge="ann"))
    with pytest.raises(UserError, match="has its vote"):
        blind.decide("tie")
    assert "pair 1" in kept.keep_pair(blind, "Speak.")
    (vote,) = VoteFile(tmp_path / "votes.jsonl").votes
    assert (vote.model_a, vote.model_b, vote.preferred, vote.judge, vote.turn) == ("x", "y", "y", "ann", 1)
    assert vote.conversation_b[-1] == {"role": "assistant", "content": "I am y"}
    options = ReadOptions(pairs=True)
    (pair,) = read_conversations(tmp_path / "pairs.jsonl", problems=ProblemLog(strict=True), options=options)
    assert pair.messages[-1].content == "I am y"
    assert pair.rejected is not None
    assert pair.rejected[-1].content == "I am x"


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    for name in ("votes.jsonl", "examples.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "mine"}) + "\n")
        with pytest.raises(UserError, match=f"{name}:1"):
            KeptFiles(tmp_path, [])
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="got a file"):
        (tmp_path / "file").touch()
        KeptFiles(tmp_path / "file", [])


# Votes


def test_sides_are_drawn_and_every_pair_gets_its_turn() -> None:
    chance = random.Random(3)
    votes = []
    for _ in range(300):
        blind = new_round(["a", "b", "c"], votes, chance)
        for _, turns in blind.sides():
            turns += [Message("user", "?"), Message("assistant", "!")]
        votes.append(blind.decide(chance.choice(WINNERS)))
    pairs = tally(votes)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {pair.count for pair in pairs} == {100}
    left = sum(vote.model_a < vote.model_b for vote in votes)
    # Of 300 fair coins; beyond five standard deviations either side is a defect.
    assert abs(left - 150) < 5 * 8.7
    for pair in pairs:
        won = sum(vote.preferred == pair.first and pair.second in (vote.model_a, vote.model_b) for vote in votes)
        assert pair.wins == won
        low, high = pair.interval
        assert low < pair.share < high


# What is shown


@given(st.text(alphabet="<>&;xyl/t `~\n!#", max_size=40))
def test_tags_of_a_text_are_shown_and_come_back(text: str) -> None:
    shown = show_tags(text)
    assert read_tags(shown) == text
    if "`" not in text and "~" not in text:
        assert not any(f"<{letter}" in shown for letter in "xyl/t!")


def test_code_is_left_to_markdown() -> None:
    assert show_tags("a <b> `<c>`\n```\n<d>\n```\n<e>") == "a &lt;b> `<c>`\n```\n<d>\n```\n&lt;e>"
    assert show_tags("```html\n<open>") == "```html\n<open>"


def test_each_shown_message_belongs_to_its_turn() -> None:
    session = talk("one", "<think>hm</think>first", "two", "second")
    shown = show_turns(session.turns)
    assert [message["content"] for message in shown] == ["one", "hm", "first", "two", "second"]
    assert [turn_at(session.turns, at) for at in range(6)] == [
        (0, False), (1, True), (1, False), (2, False), (3, False), (-1, False),
    ]  # fmt: skip
