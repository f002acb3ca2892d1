"""Each input form becomes the same conversation, and each way of being wrong has its own name."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversations import ProblemLog, list_formats, read_conversations
from peftchat.conversations.problems import KINDS
from peftchat.errors import UserError

QUESTION, ANSWER = "What is 2 + 2?", "It is 4."
PLAIN = [("user", QUESTION), ("assistant", ANSWER)]
WITH_SYSTEM = [("system", "Be short."), *PLAIN]


def turns(path: Path, rows: list[Any], **options: Any) -> list[list[tuple[str, str]]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        [(message.role, message.content) for message in conversation.messages]
        for conversation in read_conversations(path, **options)
    ]


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        (
            "messages",
            {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
            PLAIN,
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "developer", "content": "Be short."},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}],
                    },
                    {"role": "assistant", "content": ANSWER},
                ]
            },
            WITH_SYSTEM,
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
            PLAIN,
        ),
        (
            "sharegpt",
            {"conversations": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
            PLAIN,
        ),
        (
            "sharegpt",
            {
                "system": "Be short.",
                "conversations": [{"from": "user", "value": QUESTION}, {"from": "chatgpt", "value": ANSWER}],
            },
            WITH_SYSTEM,
        ),
        ("alpaca", {"instruction": QUESTION, "input": "", "output": ANSWER}, PLAIN),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2 and 2", "output": ANSWER, "history": [[QUESTION, ANSWER]]},
            [*PLAIN, ("user", "Add.\n\n2 and 2"), ("assistant", ANSWER)],
        ),
        ("prompt_completion", {"prompt": QUESTION, "completion": ANSWER}, PLAIN),
        ("prompt_completion", {"prompt": QUESTION, "response": ANSWER, "system": "Be short."}, WITH_SYSTEM),
        ("prompt_completion", {"question": QUESTION, "answer": ANSWER}, PLAIN),
        (
            "prompt_completion",
            {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada."},
            [("user", "Who?\n\nAda wrote it."), ("assistant", "Ada.")],
        ),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "user", "content": QUESTION}],
                "completion": [{"role": "assistant", "content": ANSWER}],
            },
            PLAIN,
        ),
        ("guanaco", {"text": f"### Human: {QUESTION}### Assistant: {ANSWER}"}, PLAIN),
        ("guanaco", {"text": f"Be short. ### Human: {QUESTION} ### Assistant:", "output": ANSWER}, WITH_SYSTEM),
    ],
)
def test_a_form_is_recognized_and_read(tmp_path: Path, form: str, row: dict[str, Any], expected: Any) -> None:
    log = ProblemLog(strict=True)
    path = tmp_path / "rows.jsonl"
    assert turns(path, [row], problems=log) == [expected]
    assert log.formats == {str(path): form}
    assert turns(path, [row], format=form) == [expected]


def chat(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (chat(("user", QUESTION)), "no_answer"),
        (chat(), "no_answer"),
        (chat(("system", "Be short.")), "no_answer"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "repeated_role"),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "repeated_role"),
        (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "system_not_first"),
        (chat(("user", " \n"), ("assistant", "c")), "empty_content"),
        (chat(("user", "a"), ("assistant", "")), "empty_content"),
        (chat(("waiter", "a"), ("assistant", "b")), "unknown_role"),
        (chat((["user"], "a"), ("assistant", "b")), "unknown_role"),
        (chat(("user", 5), ("assistant", "b")), "wrong_type"),
        (chat(("user", None), ("assistant", "b")), "wrong_type"),
        (chat(("user", [{"type": "image_url"}]), ("assistant", "b")), "unsupported_content"),
        (chat(("user", "a\x00"), ("assistant", "b")), "nul_character"),
        ({"messages": "hello"}, "wrong_type"),
        ({"messages": ["hello"]}, "wrong_type"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "missing_field"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "unsupported_content"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "wrong_type"),
        ({"prompt": QUESTION, "completion": ANSWER}, "other_format"),
        ([1, 2], "not_an_object"),
    ],
)
def test_a_bad_record_is_named_with_its_line_and_the_rest_is_read(tmp_path: Path, row: Any, kind: str) -> None:
    good = chat(("user", QUESTION), ("assistant", ANSWER))
    path = tmp_path / "rows.jsonl"
    log = ProblemLog()
    assert turns(path, [good, row, good], problems=log) == [PLAIN, PLAIN]
    assert dict(log.problems) == {kind: 1}
    assert log.first is not None
    assert log.first.where == f"{path}:2"
    assert log.records == 3
    with pytest.raises(UserError) as caught:
        turns(path, [good, row, good, row, row])
    assert caught.value.where == f"{path}:2"
    assert "2 more problems" in caught.value.message


def test_every_kind_of_problem_is_described() -> None:
    assert all(KINDS.values())


def test_an_unanswered_user_turn_at_the_end_is_taken_off_and_counted(tmp_path: Path) -> None:
    log = ProblemLog(strict=True)
    row = chat(("user", QUESTION), ("assistant", ANSWER), ("user", "Sure?"))
    assert turns(tmp_path / "rows.jsonl", [row], problems=log) == [PLAIN]
    assert log.notes["trailing_user_trimmed"] == 1


def test_unknown_form_and_unknown_fields_say_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question_text": 1, "reply": 2}\n')
    with pytest.raises(UserError, match=r"question_text, reply.*sharegpt"):
        list(read_conversations(path))
    with pytest.raises(UserError, match="'sharegpt'"):
        read_conversations(path, format="share-gpt")


def test_strict_reading_gives_nothing_from_behind_the_problem(tmp_path: Path) -> None:
    good = json.dumps(chat(("user", QUESTION), ("assistant", ANSWER)))
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n" * 50 + f"broken\n{good}\n")
    given: list[str] = []
    with pytest.raises(UserError, match=":51: not JSON"):
        given.extend(conversation.source for conversation in read_conversations(path))
    assert given == [f"{path}:{number}" for number in range(1, 51)]


def test_the_list_of_formats_names_every_form_once() -> None:
    names = [name for name, _ in list_formats()]
    assert names[0] == "auto"
    assert sorted(names[1:]) == sorted(
        [
            "messages",
            "sharegpt",
            "alpaca",
            "prompt_completion",
            "guanaco",
            "templated_text",
            "oasst",
            "chatgpt_export",
            "preference",
            "xlam",
            "glaive",
            "gemini",
            "self_instruct",
        ]
    )


@pytest.mark.parametrize(
    ("file", "form", "conversations"),
    [
        ("oasst_code_151.jsonl", "prompt_completion", 151),
        ("sharegpt_500.json", "sharegpt", 500),
        ("self_instruct_seed_tasks.jsonl", "self_instruct", 175),
        ("oasst1_guanaco_multilingual_500.jsonl", "guanaco", 500),
    ],
)
def test_real_files_are_read_whole(shared_data: Path, file: str, form: str, conversations: int) -> None:
    path = shared_data / file
    log = ProblemLog(strict=True)
    assert sum(1 for _ in read_conversations(path, problems=log)) == conversations
    assert log.formats == {str(path): form}
    assert not log.notes


@pytest.mark.parametrize(
    ("instances", "reason"),
    [([], "is empty"), ({"output": "b"}, "must be a list of objects"), (["b"], "must be a list of objects")],
)
def test_instances_that_are_none_name_their_record(tmp_path: Path, instances: object, reason: str) -> None:
    path = tmp_path / "tasks.jsonl"
    good = {"instruction": "do", "instances": [{"output": "a"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {"instruction": "do", "instances": instances})))
    with pytest.raises(UserError, match=rf"tasks\.jsonl:2: 'instances' {reason}"):
        list(read_conversations(path))


@pytest.mark.parametrize(
    ("winner", "trained"), [("model_a", "first"), ("model_b", "second"), ("tie", "first"), ("tie (bothbad)", None)]
)
def test_a_vote_between_two_conversations_chooses_the_one_to_train(
    winner: str, trained: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "arena.jsonl"
    asked = {"role": "user", "content": QUESTION}
    first, second, last = ([asked, {"role": "assistant", "content": text}] for text in ("first", "second", "last"))
    votes = [(first, second, winner), (first, last, "model_b")]
    path.write_text(
        "".join(json.dumps({"conversation_a": a, "conversation_b": b, "winner": won}) + "\n" for a, b, won in votes)
    )
    answers = [conversation.messages[-1].content for conversation in read_conversations(path)]
    assert answers == [*([] if trained is None else [trained]), "last"]


def test_two_lists_of_turns_are_not_taken_for_one_another(tmp_path: Path) -> None:
    path = tmp_path / "arena.jsonl"
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    path.write_text(json.dumps({"conversation_a": said, "conversation_b": said, "winner": "perhaps"}))
    with pytest.raises(UserError, match=r"conversation_b'.*the better one as `chosen`"):
        list(read_conversations(path))
    path.write_text(json.dumps({"talk": said}))
    with pytest.raises(UserError, match=r"columns: \{messages: talk\}"):
        list(read_conversations(path))


CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TALK = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        # A prompt that a template wrote, as sets for one family of models have it.
        ({"prompt": CHATML, "completion": "Hello<|im_end|>"}, set()),
        ({"prompt": CHATML, "chosen": "Hello<|im_end|>\n", "rejected": "No<|im_end|>\n"}, {"rejected"}),
        ({"prompt": "<s>[INST] Hi [/INST]", "completion": " Hello </s>"}, set()),
        ({"prompt": "### Instruction:\nHi\n\n### Response:\n", "response": "Hello"}, set()),
        ({"input": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
          "<|end_header_id|>\n\n", "output": "Hello"}, set()),
        ({"instruction": "Human:Hi\nAssistant:", "input": "", "output": "Hello"}, set()),
        # Texts alone, in turn.
        ({"data": ["Hi", "Hello"]}, set()),
        ({"conversations": ["Hi", "Hello"]}, set()),
        # The worked way is the answer, and not the bare result.
        ({"problem": "Hi", "solution": "Hello", "answer": "2"}, {"answer"}),
        ({"problem": "Hi", "generated_solution": "Hello", "expected_answer": "2"}, {"expected_answer"}),
        ({"question": "Hi", "answers": {"text": ["Hello", "Hey"], "answer_start": [0, 1]}}, {"answers"}),
        # A word that says how to think is no thought.
        ({"input": [{"role": "user", "content": "Hi"}], "output": "Hello", "reasoning": "on"}, {"reasoning"}),
        ({"prompt": "Hi", "completion": "Hello", "thinking": False}, {"thinking"}),
        ({"prompt": "Hi", "response": "Hello", "answer": "accept", "_task_hash": 7}, {"_task_hash"}),
    ],
)  # fmt: skip
def test_shapes_of_known_sets_are_one_conversation(tmp_path: Path, record: dict[str, Any], unused: set[str]) -> None:
    path, log = tmp_path / "rows.jsonl", ProblemLog(strict=True)
    path.write_text(json.dumps(record) + "\n")
    (found,) = read_conversations(path, problems=log)
    assert [(message.role, message.content) for message in found.messages] == TALK
    assert found.messages[-1].reasoning is None
    assert log.unused.keys() == unused


def test_thoughts_beside_an_answer_that_stands_beside_the_turns_are_its_own(tmp_path: Path) -> None:
    path, log = tmp_path / "rows.jsonl", ProblemLog(strict=True)
    record = {"messages": [{"role": "user", "content": "Hi"}], "reasoning": "A greeting.", "answer": "Hello"}
    path.write_text(json.dumps(record) + "\n")
    (found,) = read_conversations(path, problems=log)
    assert (found.messages[-1].content, found.messages[-1].reasoning) == ("Hello", "A greeting.")
    assert not log.unused


def test_marks_in_a_prompt_that_is_no_template_stay_text(tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.jsonl", f"What does this mean?\n{CHATML}"
    path.write_text(json.dumps({"prompt": asked, "completion": "A prompt."}) + "\n")
    (found,) = read_conversations(path)
    assert found.messages[0].content == asked


def test_what_an_annotator_rejected_is_left_out(tmp_path: Path) -> None:
    path, log = tmp_path / "rows.jsonl", ProblemLog(strict=True)
    record = {"prompt": "Hi", "response": "Hello", "_task_hash": 7}
    verdicts = ("accept", "reject", "ignore")
    path.write_text("".join(json.dumps({**record, "answer": verdict}) + "\n" for verdict in verdicts))
    assert len(list(read_conversations(path, problems=log))) == 1
    assert log.skipped["flagged_not_to_train"] == 2


@pytest.mark.parametrize(("name", "answer"), [("options", "B"), ("choices", 1), ("options", "(b)")])
def test_an_answer_that_names_an_option_beside_the_question_is_refused(tmp_path: Path, name: str, answer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "2 + 2?", name: ["3", "4"], "answer": answer}) + "\n")
    with pytest.raises(UserError, match="no part of the question"):
        list(read_conversations(path))
