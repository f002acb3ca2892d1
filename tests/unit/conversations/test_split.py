"""Seeded choices: which conversations are held out, and how often each source's conversations are used."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat.conversation import Conversation, Message
from peftchat.conversations import ProblemLog, fit_split, read_sources
from peftchat.conversations.splitting import conversation_fingerprint
from peftchat.errors import UserError
from peftchat.recipe import DataEntry
from tests.support.splitting import split_eval


def conversation(question: str, answer: str = "a") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


@given(st.lists(st.integers(0, 30), max_size=32), st.floats(0.001, 0.999), st.integers())
def test_conversations_with_one_beginning_stay_on_one_side(questions: list[int], fraction: float, seed: int) -> None:
    everything = [conversation(str(question), str(number)) for number, question in enumerate(questions)]
    train, held_out = split_eval(everything, fraction, seed)
    assert sorted(map(str, train + held_out)) == sorted(map(str, everything))
    assert not {d.messages[0] for d in train} & {d.messages[0] for d in held_out}
    if len(set(questions)) >= 2:
        assert train
        assert held_out
    else:
        assert not held_out


def test_the_fraction_is_honoured_and_the_seed_decides() -> None:
    everything = [conversation(str(number)) for number in range(20_000)]
    train, held_out = split_eval(everything, 0.1, 1)
    assert abs(len(held_out) - 2_000) < 200
    assert (train, held_out) == split_eval(everything, 0.1, 1)
    assert held_out != split_eval(everything, 0.1, 2)[1]
    assert split_eval(everything, 0.0, 1)[1] == []


def test_a_conversations_side_does_not_depend_on_the_others() -> None:
    everything = [conversation(str(number)) for number in range(1_000)]
    whole, half = fit_split(everything, 0.3, 0), fit_split(everything[::2], 0.3, 0)
    assert [whole.is_eval(d) for d in everything] == [half.is_eval(d) for d in everything]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    for name in ("a", "b"):
        rows = [{"prompt": f"{name}{number}", "completion": "x"} for number in range(2_000)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def test_weights_say_how_often_each_conversation_is_used(sources: tuple[str, str]) -> None:
    entries = [DataEntry(path=sources[0], weight=0.25), DataEntry(path=sources[1], weight=2.5)]
    log = ProblemLog(strict=True)
    used = Counter(d.messages[0].content for d in read_sources(entries, seed=3, problems=log))
    first = [used[f"a{number}"] for number in range(2_000)]
    second = [used[f"b{number}"] for number in range(2_000)]
    assert set(first) == {0, 1}
    assert set(second) == {2, 3}
    assert abs(sum(first) - 500) < 80
    assert abs(sum(second) - 5_000) < 100
    assert log.skipped["left_out_by_weight"] == 2_000 - sum(first)
    assert log.notes["repeated_by_weight"] == sum(second) - 2_000
    assert used == Counter(d.messages[0].content for d in read_sources(entries, seed=3))
    assert used != Counter(d.messages[0].content for d in read_sources(entries, seed=4))


def test_all_entries_are_checked_before_the_first_conversation(sources: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_sources([DataEntry(path=sources[0]), DataEntry(path=sources[1] + ".gone.jsonl")])


def test_each_source_has_its_own_languages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"prompt": lang, "completion": "x", "lang": lang} for lang in ("en", "de", "pt-BR")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = ProblemLog(strict=True)
    entries = [
        DataEntry(path=str(tmp_path / "a.jsonl"), languages=("en", "pt")),
        DataEntry(path=str(tmp_path / "b.jsonl"), languages=("de",)),
    ]
    used = [(Path(d.source).name[0], d.messages[0].content) for d in read_sources(entries, problems=log)]
    assert used == [("a", "en"), ("a", "pt-BR"), ("b", "de")]
    assert log.skipped == {"other_language": 3}


def test_each_source_has_its_own_rank_limit(shared_data: Path) -> None:
    trees = str(shared_data / "oasst_trees_en_60.jsonl")
    best = [d.messages for d in read_sources([DataEntry(path=trees, oasst_top_k=1)])]
    everything = [d.messages for d in read_sources([DataEntry(path=trees)])]
    both = [d.messages for d in read_sources([DataEntry(path=trees, oasst_top_k=1), DataEntry(path=trees)])]
    assert 0 < len(best) < len(everything)
    assert both == best + everything


@pytest.mark.parametrize("format", ["auto", "prompt_completion"])
def test_a_rank_limit_needs_ranks(sources: tuple[str, str], format: str) -> None:
    with pytest.raises(UserError, match="`prompt_completion` has no ranks"):
        list(read_sources([DataEntry(path=sources[0], format=format, oasst_top_k=2)]))


def numbered(questions: list[str]) -> list[Conversation]:
    return [
        Conversation((Message("user", question), Message("assistant", f"answer {number}")), f"a.jsonl:{number}")
        for number, question in enumerate(questions)
    ]


@pytest.mark.parametrize(
    "questions",
    [
        ["Good morning"] * 500,
        ["Good morning"] * 500 + [f"question {number}" for number in range(300)],
        [f"greeting {number % 4}" for number in range(900)],
        [f"greeting {number % 30}" for number in range(3_000)],
        ["x" * 5_000] * 400 + [f"question {number}" for number in range(300)],
    ],
    ids=["one", "most", "four", "thirty", "long"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_is_kept_where_many_start_alike(questions: list[str], seed: int) -> None:
    everything = numbered(questions)
    train, held_out = split_eval(everything, 0.1, seed)
    assert 0.06 < len(held_out) / len(everything) < 0.14
    assert (train, held_out) == split_eval(everything, 0.1, seed)
    remarks = fit_split(everything, 0.1, seed).remarks
    assert remarks
    assert all("of the conversations start with" in remark and len(remark) < 200 for remark in remarks)


def test_behind_a_greeting_conversations_stay_together_that_go_on_alike() -> None:
    everything = [
        Conversation(
            (
                Message("user", "Hello"),
                Message("assistant", "Hello! What is it?"),
                Message("user", f"problem {number % 150}"),
                Message("assistant", f"solution {number}"),
            ),
            f"a.jsonl:{number}",
        )
        for number in range(1_200)
    ]
    train, held_out = split_eval(everything, 0.1, 0)
    assert 0.03 < len(held_out) / len(everything) < 0.17
    assert not {one.messages[2] for one in train} & {one.messages[2] for one in held_out}


def test_the_branches_of_a_tree_stay_together_however_many_they_are() -> None:
    tree = [Conversation(one.messages, "trees.jsonl:7") for one in numbered(["the prompt of a large tree"] * 200)]
    for seed in range(5):
        train, held_out = split_eval([*tree, *numbered([f"question {number}" for number in range(300)])], 0.1, seed)
        assert "the prompt of a large tree" not in {one.messages[0].content for one in (train, held_out)[0]} & {
            one.messages[0].content for one in held_out
        }


def test_where_nothing_can_be_held_out_the_reason_is_told() -> None:
    for everything in (numbered(["Hello"] * 12), [conversation("Hello")] * 300):
        split = fit_split(everything, 0.2, 0)
        assert not any(map(split.is_eval, everything))
        assert split.remarks == (
            f"No conversation is held out: all {len(everything)} start with the same user message, and those that "
            "start alike stay together.",
        )


def test_conversations_about_other_documents_are_no_duplicates() -> None:
    messages = (Message("user", "Where?"), Message("assistant", "Here."))
    told = [Conversation(messages, columns={"documents": [text], "id": number}) for number, text in enumerate("xyy")]
    first, second, third = map(conversation_fingerprint, told)
    assert first != second == third
    assert conversation_fingerprint(Conversation(messages)) not in (first, second)
