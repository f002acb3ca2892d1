"""Ids and labels against a slow encoder that goes through stock transformers."""

import copy
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample, ExampleBatch
from peftchat.chat_template.loss_mask import LossOn, labels_for, loss_mask_table
from peftchat.chat_template.templates import ChatTemplate, TemplateSpan
from peftchat.conversation import ROLES, Conversation, Message, Role
from tests.support.borders import check_borders
from tests.support.random_text import FORGERIES, conversations
from tests.support.slow_encoder import SlowEncoder
from tests.support.tokenizers import BUILDERS, built

STARCHAT_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
POLICIES: tuple[LossOn, ...] = get_args(LossOn)
THOROUGH = {"byte-level", "llama2", "unigram-first", "unigram-always-with-control-tokens"}


def check_against_slow_encoder(tokenizer: Any, clean: Any, template: str, system: str | None, count: int) -> None:
    """Ids, and labels of every policy, of random conversations."""
    chat = make_format(template, system, copy.deepcopy(tokenizer))
    slow = SlowEncoder(chat.tokenizer, clean, template, system)
    batch = conversations(count, STARCHAT_ROLES) if template == "starchat" else conversations(count)
    tables = {policy: loss_mask_table(policy) for policy in POLICIES}
    encoder, borders = chat.encoder(), 0
    rows = [row for start in range(0, count, 500) for row in encoder.encode(batch[start : start + 500])]
    for conversation, row, expected in zip(batch, rows, slow.encode(batch), strict=True):
        assert row.source == conversation.source
        if row.ids.tolist() != expected.ids.tolist():
            check_borders(chat.tokenizer, row, expected.ids.tolist(), slow.answer_header())
            borders += 1
            continue
        for policy in POLICIES:
            labels = labels_for(row.ids, row.token_tags, tables[policy])
            assert np.array_equal(labels, expected.labels(policy)), (policy, conversation)
    assert sum(row.special_token_text for row in rows) > count / 10
    assert borders < count / 2


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_as_roles(name: str) -> None:
    case = built(name)
    check_against_slow_encoder(case.tokenizer, case.clean, "starchat", "", 3_000 if name in THOROUGH else 1_000)


@pytest.mark.parametrize("name", BUILDERS)
def test_words_as_roles(name: str) -> None:
    case = built(name)
    check_against_slow_encoder(case.tokenizer, case.clean, "chatml", None, 500)


def test_a_real_small_models_tokenizer(stories: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    check_against_slow_encoder(tokenizer, tokenizer, "starchat", "Be brief.", 1_000)


@pytest.mark.real
@pytest.mark.parametrize("template", ["starchat", "chatml"])
def test_smollms_tokenizer(demo_model: Path, template: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    check_against_slow_encoder(tokenizer, tokenizer, template, None, 1_000)


_TEXT = st.lists(st.one_of(st.text(max_size=6), st.sampled_from([*FORGERIES, "\n", " ", "\n\n"])), max_size=5).map(
    "".join
)
_CONVERSATIONS = st.lists(st.builds(Message, st.sampled_from(ROLES), _TEXT), max_size=5).map(tuple)


@cache
def chatml_encoder(name: str) -> tuple[ChatEncoder, set[int], list[int]]:
    """An encoder, all special ids but the unknown one, and the ids around each content."""
    chat = make_format("chatml", None, copy.deepcopy(built(name).tokenizer))
    tokenizer = chat.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    turn = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    return chat.encoder(), special - ({tokenizer.unk_token_id} - set(turn)), turn


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(sorted(BUILDERS)), _CONVERSATIONS)
def test_no_message_can_write_a_special_token(name: str, messages: tuple[Message, ...]) -> None:
    encoder, special, turn = chatml_encoder(name)
    (row,) = encoder.encode([Conversation(messages)])
    assert [number for number in row.ids.tolist() if number in special] == turn * len(messages)


def test_special_token_text_is_counted() -> None:
    encoder, _, _ = chatml_encoder("llama2")
    messages = (Message("user", "<|im_end|><|im_end|> </s>"), Message("assistant", "<|im_end> <|end|>"))
    (row,) = encoder.encode([Conversation(messages)])
    assert row.special_token_text == 3


def test_an_empty_conversation_is_an_empty_example() -> None:
    encoder, _, _ = chatml_encoder("byte-level")
    assert [(len(row.ids), len(row.token_tags)) for row in encoder.encode([Conversation(())])] == [(0, 0)]
    assert encoder.encode([]) == []


def test_batches_do_not_change_examples() -> None:
    encoder, _, _ = chatml_encoder("phi3")
    batch = conversations(100)
    together = encoder.encode(batch)
    for conversation, row in zip(batch, together, strict=True):
        (alone,) = encoder.encode([conversation])
        assert np.array_equal(alone.ids, row.ids) and np.array_equal(alone.token_tags, row.token_tags)


@dataclass(frozen=True)
class OnlyPieces:
    """A block format that does not say it is one, so that it is encoded piece by piece like any other."""

    block: ChatTemplate
    missing_roles: frozenset[Role] = frozenset()

    def examples(self, conversation: Conversation) -> list[Iterator[TemplateSpan]]:
        return self.block.examples(conversation)

    def examples_of(self, conversations: Sequence[Conversation]) -> list[list[Iterator[TemplateSpan]]]:
        return [self.examples(conversation) for conversation in conversations]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("system", [None, "<|im_end|> by default"])
def test_blocks_and_pieces_are_encoded_alike(name: str, system: str | None) -> None:
    chat = make_format("chatml", system, copy.deepcopy(built(name).tokenizer))
    assert isinstance(chat.template, ChatTemplate)
    batch = conversations(400)
    by_pieces = ChatEncoder(chat.tokenizer, OnlyPieces(chat.template)).encode(batch)
    for row, other in zip(chat.encoder().encode(batch), by_pieces, strict=True):
        assert np.array_equal(row.ids, other.ids) and np.array_equal(row.token_tags, other.token_tags)
        assert (row.source, row.special_token_text) == (other.source, other.special_token_text)


def test_threads_do_not_disturb_each_other() -> None:
    encoder, _, _ = chatml_encoder("byte-level")
    batch = conversations(400)
    quarters = [batch[start : start + 100] for start in range(0, 400, 100)]
    with ThreadPoolExecutor(4) as pool:
        threaded = [row for rows in pool.map(encoder.encode, quarters * 3) for row in rows]
    for row, other in zip(threaded, encoder.encode(batch) * 3, strict=True):
        assert np.array_equal(row.ids, other.ids) and np.array_equal(row.token_tags, other.token_tags)


@given(st.lists(st.integers(0, 5), max_size=8), st.randoms())
def test_counts_of_a_batch_are_those_of_its_examples(lengths: list[int], draw: random.Random) -> None:
    table = loss_mask_table("answers")
    rows = [
        EncodedExample(
            np.zeros(length, np.int32), np.array([draw.randrange(128) for _ in range(length)], np.uint8), f"{length}", 1
        )
        for length in lengths
    ]
    batch = ExampleBatch.of(rows)
    assert batch.lengths.tolist() == lengths
    assert batch.counts(table).tolist() == [int(table[row.token_tags[1:]].sum()) for row in rows]
    assert [row.token_tags.tolist() for row in batch] == [row.token_tags.tolist() for row in rows]
