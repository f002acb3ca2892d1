"""Adding a format's tokens to tokenizers of all kinds."""

import copy
from pathlib import Path

import pytest
from tokenizers import AddedToken

from peftchat.chat_template.chat_format import NewToken, make_format
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.chat_template.text_encoder import special_tokens
from peftchat.conversation import Conversation, Message
from tests.support.tokenizers import BUILDERS, built

ORDER = ["<|system|>", "<|assistant|>", "<|user|>", "<|end|>"]


@pytest.mark.parametrize("name", BUILDERS)
def test_each_token_is_one_id_also_after_saving(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat = make_format("starchat", None, copy.deepcopy(built(name).tokenizer))
    chat.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for token in ORDER:
        (number,) = saved.encode(token, add_special_tokens=False)
        assert number == chat.tokenizer.convert_tokens_to_ids(token) == special_tokens(saved)[token]
    assert saved.eos_token == "<|end|>"
    assert saved.pad_token is not None


def test_new_ids_follow_the_order() -> None:
    tokenizer = copy.deepcopy(built("byte-level").tokenizer)
    first = len(tokenizer)
    chat = make_format("starchat", None, tokenizer)
    assert list(chat.new_tokens) == [NewToken(token, first + place) for place, token in enumerate(ORDER)]
    assert chat.tokenizer.pad_token == "<|endoftext|>"


def test_tokens_that_are_there_keep_their_ids() -> None:
    tokenizer = copy.deepcopy(built("byte-level").tokenizer)
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|user|>", special=False)])
    chat = make_format("starchat", None, tokenizer)
    assert list(chat.new_tokens) == [NewToken("<|system|>", first + 2), NewToken("<|assistant|>", first + 3)]
    (row,) = chat.encoder().encode([Conversation((Message("user", "<|user|>"), Message("assistant", "")))])
    newline = tokenizer.encode("\n")
    spelled = row.ids.tolist()[2:-6]
    assert first + 1 not in spelled
    assert row.ids.tolist() == [first + 1, *newline, *spelled, first, *newline, first + 3, *newline, first, *newline]
    assert loss_mask_table("answers")[row.token_tags].nonzero()[0].tolist() == [len(row.ids) - 2]


def test_an_old_end_token_stays_special() -> None:
    from transformers import ByT5Tokenizer

    chat = make_format("starchat", None, ByT5Tokenizer())
    (row,) = chat.encoder().encode([Conversation((Message("user", "</s><pad>"), Message("assistant", "a</s>")))])
    special = [number for number in row.ids.tolist() if number in special_tokens(chat.tokenizer).values()]
    assert chat.tokenizer.convert_ids_to_tokens(special) == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert row.special_token_text == 3
