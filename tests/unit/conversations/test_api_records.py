"""Records of chat APIs, answers beside their turns, and ranked answers, against what they say."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversation import Conversation
from peftchat.conversations import ProblemLog, read_conversations
from peftchat.conversations.problems import ReadOptions
from peftchat.errors import UserError

ASKED = [{"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "Hello"}
SAID = [("user", "Hi"), ("assistant", "Hello")]
CALLED = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}


def read(path: Path, *records: object, pairs: bool = False) -> tuple[list[Conversation], ProblemLog]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    log = ProblemLog(strict=True)
    return list(read_conversations(path, problems=log, options=ReadOptions(pairs=pairs))), log


def turns_of(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED, "response": "Hello"},
        {"messages": ASKED, "completion": ANSWER},
        {"conversations": [{"from": "human", "value": "Hi"}], "output": "Hello"},
        {"messages": ASKED, "choices": [{"finish_reason": "stop", "message": ANSWER}]},
        {"messages": ASKED, "response": {"choices": [{"message": ANSWER}]}},
        {"messages": ASKED, "response": ANSWER},
        {
            "request": {"messages": ASKED, "temperature": 0},
            "response": {"choices": [{"message": {"content": "Hello"}}]},
        },
        {"body": {"messages": ASKED}, "custom_id": "a", "response": {"body": {"choices": [{"message": ANSWER}]}}},
        {
            "request_body": json.dumps({"messages": ASKED}),
            "response_body": json.dumps({"choices": [{"message": ANSWER}]}),
        },
        {"inputs": {"messages": ASKED}, "outputs": {"message": ANSWER}},
        {"inputs": {"question": "Hi"}, "outputs": {"answer": "Hello"}},
        {"request": {"messages": ASKED}, "response": {**ANSWER, "content": [{"type": "text", "text": "Hello"}]}},
        {"input": "Hi", "output": [{"type": "message", "role": "assistant", "content": "Hello"}]},
        {"request": {"input": ASKED}, "response": {"output": [{"type": "message", **ANSWER, "status": "completed"}]}},
    ],
)
def test_what_was_sent_and_what_came_back_are_a_conversation(tmp_path: Path, record: dict[str, Any]) -> None:
    (found,), _ = read(tmp_path / "log.jsonl", record)
    assert turns_of(found) == SAID


def test_a_field_beside_an_exchange_by_the_name_of_one_in_it_is_told(tmp_path: Path) -> None:
    exchange = {"request": {"messages": ASKED}, "response": {"choices": [{"message": ANSWER}]}}
    (found,), log = read(tmp_path / "log.jsonl", {**exchange, "messages": [{"role": "user", "content": "Another."}]})
    assert turns_of(found) == SAID
    assert "outer_messages" in " ".join(log.unused)
    (found,), log = read(tmp_path / "copy.jsonl", {**exchange, "messages": ASKED})
    assert turns_of(found) == SAID
    assert not log.unused


@pytest.mark.parametrize("response", [{}, {"status": 200}, {"answer": None}, {"answer": "No."}])
def test_a_response_without_an_answer_is_a_column(tmp_path: Path, response: dict[str, Any]) -> None:
    (found,), _ = read(tmp_path / "log.jsonl", {"messages": [*ASKED, ANSWER], "response": response})
    assert turns_of(found) == SAID
    assert found.columns["response"] == response


def test_items_of_one_answer_are_one_turn(tmp_path: Path) -> None:
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Ask."}]}
    record = {
        "instructions": "Be kind.",
        "input": "Warm?",
        "tools": [{"type": "function", "name": "weather", "parameters": {}}],
        "output": [thought, CALLED, {"type": "function_call_output", "call_id": "c1", "output": "21"}, {**ANSWER}],
    }
    (found,), log = read(tmp_path / "items.jsonl", record)
    assert turns_of(found) == [("system", "Be kind."), ("user", "Warm?"), ("assistant", ""), ("tool", "21"), SAID[1]]
    call, result = found.messages[2], found.messages[3]
    assert call.reasoning == "Ask."
    assert [(one.name, one.arguments, one.id) for one in call.tool_calls] == [("weather", "{}", "c1")]
    assert result.tool_call_id == "c1"
    assert not log.unused


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED, "choices": [{"finish_reason": "length", "message": ANSWER}]},
        {"request": {"messages": ASKED}, "response": {**ANSWER, "stop_reason": "max_tokens"}},
        {"input": "Hi", "output": [{"type": "message", **ANSWER, "status": "incomplete"}]},
    ],
)
def test_an_answer_that_was_cut_off_is_left_out_and_counted(tmp_path: Path, record: dict[str, Any]) -> None:
    found, log = read(tmp_path / "log.jsonl", {"messages": [*ASKED, ANSWER]}, record)
    assert [turns_of(one) for one in found] == [SAID]
    assert log.skipped == {"answer_cut_off": 1}


def test_files_of_the_batch_api_are_joined_by_a_command_that_the_error_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"group_by\(.custom_id\)"):
        read(tmp_path / "requests.jsonl", {"custom_id": "a", "body": {"messages": ASKED}})


RANKED = {
    "prompt": "Hi",
    "completions": [{"response": "No", "overall_score": 2}, {"response": "Hello", "overall_score": 9}],
}
TIED = {
    "prompt": "Hi",
    "completions": [{"response": "Hello", "overall_score": 9}, {"response": "No", "overall_score": 9}],
}


@pytest.mark.parametrize(
    "record",
    [
        RANKED,
        {
            "prompt": "Hi",
            "answers": [
                {"answer": "Hello", "rank": 1.0},
                {"answer": "So?", "rank": 2.0},
                {"answer": "No", "rank": 3.0},
            ],
        },
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [{"answer": "No", "rank": 2}, {"answer": "Hello", "rank": 1}],
        },
        {
            "prompt": "Hi",
            "answers": [{"answer": "?", "rank": None}, {"answer": "No", "rank": 2}, {"answer": "Hello", "rank": 1}],
        },
        {"prompt": "Hi", "response_0": "No", "response_1": "Hello", "better_response_id": 1},
        {"instruction": "Hi", "input": "", "output_1": "Hello", "output_2": "No", "preference": 1},
        {"history": "Hi", "human_ref_A": "No", "human_ref_B": "Hello", "labels": 0},
    ],
)
def test_the_best_answer_is_read_and_the_worst_rejected(tmp_path: Path, record: dict[str, Any]) -> None:
    (found,), log = read(tmp_path / "ranked.jsonl", record)
    assert turns_of(found) == SAID
    assert "rejected" in log.unused
    (pair,), _ = read(tmp_path / "ranked.jsonl", record, pairs=True)
    assert turns_of(pair) == SAID
    assert [message.content for message in pair.rejected or ()] == ["Hi", "No"]


def test_answers_with_one_score_make_no_pair(tmp_path: Path) -> None:
    found, _ = read(tmp_path / "ranked.jsonl", RANKED, TIED)
    assert [turns_of(one) for one in found] == [SAID, SAID]
    pairs, log = read(tmp_path / "ranked.jsonl", RANKED, TIED, pairs=True)
    assert len(pairs) == 1
    assert log.skipped == {"answers_tie": 1}
