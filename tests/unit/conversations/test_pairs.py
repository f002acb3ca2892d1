"""Preference pairs of every spelling: both answers are read alike, and what is no pair is refused by its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversation import Conversation, Message
from peftchat.conversations import ProblemLog
from peftchat.conversations.prepare import PrepareOptions, prepare
from peftchat.conversations.problems import ReadOptions
from peftchat.conversations.reading import read_conversations
from peftchat.errors import UserError

USER, GOOD, BAD = {"role": "user", "content": "Hi"}, "Hello!", "What?"
CHOSEN, REJECTED = {"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}
SYSTEM = {"role": "system", "content": "Be kind."}


def read(folder: Path, *records: Any, log: ProblemLog | None = None, pairs: bool = True) -> list[Conversation]:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_conversations(path, problems=log, options=ReadOptions(pairs=pairs)))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": GOOD, "rejected": BAD},
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]},
        {"input": "Hi", "preferred_output": GOOD, "non_preferred_output": BAD},
        {"instruction": "Hi", "chosen_response": GOOD, "rejected_response": BAD, "chosen_model": "a", "source": "b"},
        {"question": "Hi", "response_j": GOOD, "response_k": BAD},
        {"input": "Hi", "chosen": GOOD, "rejected": BAD},
        {"question": "Hi", "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": [USER], "chosen": CHOSEN, "rejected": REJECTED},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        # UltraFeedback: the prompt once more, and the chosen conversation as `messages`.
        {
            "prompt": "Hi", "prompt_id": "1", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED],
            "messages": [USER, CHOSEN], "score_chosen": 8.0, "score_rejected": 3.5,
        },
        # LLaMA-Factory's ranking form.
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": GOOD},
         "rejected": {"from": "gpt", "value": BAD}},
        {"chosen": f"\n\nHuman: Hi\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: Hi\n\nAssistant: {BAD}"},
        {"prompt": "Hi", "chosen": json.dumps([USER, CHOSEN]), "rejected": json.dumps([USER, REJECTED])},
        # ms-swift.
        {"messages": [USER, CHOSEN], "rejected_response": BAD},
        {"messages": [USER, CHOSEN], "rejected_messages": [USER, REJECTED]},
        # HelpSteer, and votes between two models.
        {"prompt": "Hi", "response_1": BAD, "response_2": GOOD, "preference_strength": 2},
        {"context": [USER], "response1": GOOD, "response2": BAD, "overall_preference": -1},
        {"prompt": "Hi", "response_a": BAD, "response_b": GOOD, "winner": "model_b"},
        {"conversation_a": [USER, CHOSEN], "conversation_b": [USER, REJECTED], "winner": "model_a"},
    ],
)  # fmt: skip
def test_both_answers_are_read(record: dict[str, Any], tmp_path: Path) -> None:
    log = ProblemLog()
    (pair,) = read(tmp_path, record, log=log)
    assert pair.messages == (Message("user", "Hi"), Message("assistant", GOOD))
    assert pair.rejected == (Message("user", "Hi"), Message("assistant", BAD))
    assert pair.shared_turns == 1
    assert "rejected" not in log.unused
    # The same record as a conversation: the chosen answer, and a word on the other one.
    plain = ProblemLog()
    (conversation,) = read(tmp_path, record, log=plain, pairs=False)
    assert conversation.messages == pair.messages and conversation.rejected is None
    assert "rejected" in plain.unused


def test_pairs_with_unknown_names_are_told_their_columns(tmp_path: Path) -> None:
    record = {"q": "Hi", "chosen_text": GOOD, "rejected_text": BAD, "chosen_by": "a", "rejected_by": "b"}
    with pytest.raises(UserError) as error:
        read(tmp_path, record)
    assert "`columns: {chosen: chosen_text, rejected: rejected_text}`" in str(error.value.hint)


def test_system_prompts_and_earlier_rounds_are_shared(tmp_path: Path) -> None:
    earlier = [USER, CHOSEN, {"role": "user", "content": "And?"}]
    (beside,) = read(tmp_path, {"system": "Be kind.", "prompt": earlier, "chosen": "Yes.", "rejected": "No."})
    (inside,) = read(tmp_path, {
        "prompt": earlier, "chosen": [SYSTEM, *earlier, {"role": "assistant", "content": "Yes."}],
        "rejected": [SYSTEM, *earlier, {"role": "assistant", "content": "No."}],
    })  # fmt: skip
    assert beside.messages == inside.messages and beside.rejected == inside.rejected
    assert beside.shared_turns == 4


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ({"prompt": "Hi", "chosen": GOOD, "rejected": GOOD}, "identical_answers", "are the same"),
        ({"chosen": GOOD, "rejected": BAD}, "missing_field", "without a question: there is no 'prompt'"),
        ({"prompt": "Hi", "chosen": GOOD, "rejected": ""}, "empty_content", "in the rejected conversation: .* empty"),
        ({"prompt": "Hi", "chosen": " ", "rejected": BAD}, "empty_content", "the assistant message is empty"),
        ({"prompt": "Hi", "chosen": GOOD, "rejected": 3}, "wrong_type", "rejected conversation: 'rejected' must be"),
        ({"prompt": "Hi", "chosen": GOOD}, "missing_field", "no field 'rejected'"),
        (
            {"chosen": [USER, CHOSEN], "rejected": [{"role": "user", "content": "Bye"}, REJECTED]},
            "no_prompt", "no question in common",
        ),
        (
            {"chosen": [{"role": "system", "content": "Be kind."}, USER, CHOSEN], "rejected": [USER, REJECTED]},
            "no_prompt", "no question in common: their system messages differ",
        ),
        (
            {"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN, {"role": "user", "content": "x"}, REJECTED]},
            "no_prompt", "the chosen conversation ends there",
        ),
        (
            {"chosen": [USER, CHOSEN, {"role": "user", "content": "a"}, CHOSEN],
             "rejected": [USER, CHOSEN, {"role": "user", "content": "b"}, REJECTED]},
            "no_prompt", "part at a turn that is no answer .turn 3.",
        ),
    ],
)  # fmt: skip
def test_what_is_no_pair_goes_to_quarantine_or_ends_the_reading(
    record: dict[str, Any], kind: str, words: str, tmp_path: Path
) -> None:
    good = {"prompt": "Hi", "chosen": GOOD, "rejected": BAD}
    log = ProblemLog()
    assert len(read(tmp_path, good, record, good, log=log)) == 2
    assert log.problems[kind] == 1
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, good, record)
    assert error.value.where == f"{tmp_path / 'pairs.jsonl'}:2"


def test_conversations_are_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no field 'chosen': a preference pair has 'chosen' and 'rejected'"):
        read(tmp_path, {"messages": [USER, CHOSEN]})


def test_prepared_pairs_are_the_same_pairs(tmp_path: Path) -> None:
    """Written and read again; equal prompts in one split, equal pairs once, bad records aside."""
    records = [{"prompt": f"Question {n % 9}", "chosen": f"{GOOD} {n}", "rejected": f"{BAD} {n}"} for n in range(30)]
    tools = [{"name": "find", "parameters": {}}]
    records += [
        records[0], {"prompt": "Hi", "chosen": GOOD, "rejected": GOOD},
        {"system": "Be kind.", "tools": tools, "prompt": "Hi", "chosen": GOOD, "rejected": BAD, "id": 1.50},
    ]  # fmt: skip
    pairs = read(tmp_path, *records, log=ProblemLog())
    card = prepare(str(tmp_path / "pairs.jsonl"), tmp_path / "out", PrepareOptions(pairs=True, eval_fraction=0.3))
    found = [
        list(read_conversations(tmp_path / "out" / name, options=ReadOptions(pairs=True)))
        for name in ("train.jsonl", "eval.jsonl")
    ]
    texts = {repr((one.messages, one.rejected, one.tools)) for one in pairs}
    again = [repr((one.messages, one.rejected, one.tools)) for part in found for one in part]
    assert set(again) == texts and len(again) == len(texts) == 31
    assert card.skipped["duplicate"] == 1 and card.problems == {"identical_answers": 1}
    prompts = [{one.messages[-2].content for one in part} for part in found]
    assert prompts[0].isdisjoint(prompts[1]) and all(prompts)
    (aside,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert aside["where"].endswith("pairs.jsonl:32")
