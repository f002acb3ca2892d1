"""Conversations that are too long: cut between exchanges only, every cut counted."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import TurnPart, part_of, role_of
from peftchat.conversation import Conversation, Message, Role
from peftchat.dataset.cache import EncodedSplit, encode_splits
from peftchat.dataset.truncation import Truncated, TruncationSide, rounds, truncate_to_fit
from peftchat.recipe import load_recipe
from tests.support.data import write_conversations
from tests.support.recipes import write_recipe
from tests.support.tokenizers import built, save_tokenizer

CUTS: tuple[TruncationSide, ...] = ("turns", "drop_first_turns", "split")
_WORDS = st.lists(st.sampled_from(["one", "two", "three", "\n", "日本", "12", "  "]), min_size=1, max_size=12).map(
    " ".join
)
_ANSWERS = _WORDS.map(str.lstrip)
"""Stock may merge white space with the header."""


@st.composite
def _exchange(draw: st.DrawFn) -> list[Message]:
    asked = Message("user", draw(_WORDS))
    steps = draw(st.lists(st.tuples(_ANSWERS, _WORDS), max_size=2))
    called = [Message(role, text) for call in steps for role, text in zip(("assistant", "tool"), call, strict=True)]
    return [asked, *called, Message("assistant", draw(_ANSWERS))]


@st.composite
def _conversation(draw: st.DrawFn) -> tuple[list[Message], list[list[Message]]]:
    """A system message or none, and one to eight exchanges, some with tool calls."""
    system = [Message("system", draw(_WORDS))] if draw(st.booleans()) else []
    return system, draw(st.lists(_exchange(), min_size=1, max_size=8))


@cache
def chatml() -> ChatFormat:
    return make_format("chatml", None, built("byte-level").tokenizer)


def stock_ids(messages: list[Message]) -> list[int]:
    """What stock transformers makes of the messages."""
    tokenizer: Any = chatml().tokenizer
    return list(tokenizer.apply_chat_template([vars_of(message) for message in messages], return_dict=False))


def vars_of(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def joined(parts: list[list[Message]]) -> list[Message]:
    return [message for part in parts for message in part]


def cut_up(system: list[Message], parts: list[list[Message]], limit: int, cut: TruncationSide) -> Truncated:
    conversation, encoder = Conversation((*system, *joined(parts)), "d:1"), chatml().encoder()
    return truncate_to_fit(conversation, len(encoder.encode([conversation])[0].ids), encoder, limit, cut)


def ends_every_answer(row: EncodedExample) -> bool:
    """Whether each assistant turn of the example holds exactly one end token, behind its content."""
    parts = [part_of(value) for value in row.token_tags.tolist() if role_of(value) == "assistant"]
    return parts.count(TurnPart.END) == sum(
        part == TurnPart.HEADER and (place == 0 or parts[place - 1] != TurnPart.HEADER)
        for place, part in enumerate(parts)
    )


@settings(max_examples=60, deadline=None, database=None)
@given(_conversation(), st.integers(10, 120))
def test_the_first_or_last_exchanges_that_fit_are_kept(
    conversation: tuple[list[Message], list[list[Message]]], limit: int
) -> None:
    system, parts = conversation
    lengths = {
        (start, stop): len(stock_ids([*system, *joined(parts[start:stop])]))
        for start, stop in [(0, count) for count in range(1, len(parts) + 1)]
        + [(count, len(parts)) for count in range(len(parts))]
    }
    for cut, ranges in (
        ("turns", [(0, count) for count in range(len(parts), 0, -1)]),
        ("drop_first_turns", [(count, len(parts)) for count in range(len(parts))]),
    ):
        fitted = cut_up(system, parts, limit, cut)  # type: ignore[arg-type]
        best = next((one for one in ranges if lengths[one] <= limit), None)
        if best is None:
            assert fitted == Truncated((), len(parts))
        else:
            (row,) = fitted.examples
            assert row.ids.tolist() == stock_ids([*system, *joined(parts[slice(*best)])])
            assert fitted.lost == len(parts) - (best[1] - best[0])
            assert ends_every_answer(row) and row.source == "d:1"


@settings(max_examples=60, deadline=None, database=None)
@given(_conversation(), st.integers(10, 120))
def test_a_divided_conversation_keeps_every_exchange_that_fits_alone(
    conversation: tuple[list[Message], list[list[Message]]], limit: int
) -> None:
    system, parts = conversation
    # Slow and greedy, one exchange after the other.
    expected: list[list[list[Message]]] = []
    fresh = True
    lost = 0
    for part in parts:
        if len(stock_ids([*system, *part])) > limit:
            lost += 1
            fresh = True
        elif fresh or len(stock_ids([*system, *joined(expected[-1]), *part])) > limit:
            expected.append([part])
            fresh = False
        else:
            expected[-1].append(part)
    fitted = cut_up(system, parts, limit, "split")
    assert [row.ids.tolist() for row in fitted.examples] == [stock_ids([*system, *joined(some)]) for some in expected]
    assert fitted.lost == lost
    assert all(ends_every_answer(row) and len(row.ids) <= limit for row in fitted.examples)


@given(_conversation())
@settings(max_examples=30, deadline=None, database=None)
def test_exchanges_begin_with_the_user(conversation: tuple[list[Message], list[list[Message]]]) -> None:
    system, parts = conversation
    found_system, found = rounds(Conversation((*system, *joined(parts))))
    assert list(found_system) == system and [list(one) for one in found] == parts


@pytest.mark.parametrize("cut", CUTS)
def test_a_question_without_an_answer_is_no_example(cut: TruncationSide) -> None:
    parts = [[Message("user", "one"), Message("assistant", "two")], [Message("user", "three " * 50)]]
    fitted = cut_up([], parts, 30, cut)
    kept = [] if cut == "drop_first_turns" else [stock_ids(parts[0])]
    assert [row.ids.tolist() for row in fitted.examples] == kept


def turns(*words: str) -> list[tuple[str, str]]:
    roles: tuple[Role, ...] = ("user", "assistant")
    return [(roles[number % 2], word) for number, word in enumerate(words)]


LONG = [("system", "Be brief."), *turns("one", "two", "three", "four", "five " * 40, "six", "seven", "eight")]


def rows_of(tmp_path: Path, truncation: str, max_length: int) -> EncodedSplit:
    tokenizer = save_tokenizer(tmp_path / "model")
    source = write_conversations(tmp_path / "d.jsonl", [turns("one", "two"), LONG, turns("one " * 80, "two")])
    data = {"max_length": max_length, "truncation": truncation}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tokenizer, source, data=data), to_train=False).recipe
    return encode_splits(recipe, make_format("starchat", None, AutoTokenizer.from_pretrained(recipe.model.name)))[
        "train"
    ]


@pytest.mark.parametrize(
    ("truncation", "rows", "shortened", "cut", "divided", "parts"),
    [("turns", 2, 1, 2, 0, 0), ("drop_first_turns", 2, 1, 3, 0, 0), ("split", 3, 1, 1, 1, 2), ("drop", 1, 0, 0, 0, 0)],
)
def test_every_cut_is_counted(
    tmp_path: Path, truncation: str, rows: int, shortened: int, cut: int, divided: int, parts: int
) -> None:
    made = rows_of(tmp_path, truncation, 60)
    stats = made.stats
    assert (stats.examples, len(made.store)) == (rows, rows)
    assert (stats.truncated, stats.rounds_dropped, stats.split, stats.split_examples) == (
        shortened,
        cut,
        divided,
        parts,
    )
    assert stats.dropped == {"too_long": 2 if truncation == "drop" else 1}
    assert all(place.endswith(":2") for place in stats.first_sources.get("truncated", []))
    assert stats.tokens == int(made.store.lengths.sum()) and max(made.store.lengths) <= 60
