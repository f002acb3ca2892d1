"""The two block formats against their own Jinja form in stock `apply_chat_template`."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2.exceptions import TemplateError

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.chat_template.loss_mask import labels_for, loss_mask_table
from peftchat.chat_template.templates import CHAT_TEMPLATES
from peftchat.conversation import ROLES, Conversation, Message, Role
from peftchat.errors import UserError
from tests.support.borders import check_borders
from tests.support.random_text import conversations
from tests.support.tokenizers import BUILDERS, built

SYSTEMS = [
    None,
    "",
    'You are "peftchat", it\'s {{ messages }} {% raw %} {# no #} }} %}\n\n\tnaïve 日本 🎉 \\n \\u0041 \x7f\u2028',
]


def roles_of(template: str) -> tuple[Role, ...]:
    return ("system", "user", "assistant") if template == "starchat" else ROLES


def by_hand(template: str, system: str | None, conversation: Conversation) -> str:
    """The format, written out."""
    turns = [(message.role, message.content) for message in conversation.messages]
    if system is not None and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", system))
    if template == "starchat":
        return "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in turns)
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("template", ["starchat", "chatml"])
def test_rendered_text(template: str, system: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat = make_format(template, system, copy.deepcopy(built("byte-level").tokenizer))
    chat.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    opening = "<|assistant|>\n" if template == "starchat" else "<|im_start|>assistant\n"
    for conversation in conversations(1_000, roles_of(template)):
        if not conversation.messages:
            continue
        expected = by_hand(template, system, conversation)
        assert "".join(piece.text for piece in chat.template.spans(conversation)) == expected
        messages = conversation.as_dicts()
        assert chat.tokenizer.apply_chat_template(messages, tokenize=False) == expected
        assert saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected + opening


def stock(tokenizer: Any, batch: list[Conversation]) -> tuple[list[list[int]], list[list[int]]]:
    messages = [conversation.as_dicts() for conversation in batch]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    return encoded["input_ids"], encoded["assistant_masks"]


def check_against_stock(chat: ChatFormat, batch: list[Conversation], *, masks: bool) -> None:
    table = loss_mask_table("answers")
    rows = chat.encoder().encode(batch)
    for conversation, row, ids, mask in zip(batch, rows, *stock(chat.tokenizer, batch), strict=True):
        if row.ids.tolist() != ids:
            header = "<|assistant|>\n" if chat.template.name == "starchat" else "<|im_start|>assistant\n"
            check_borders(chat.tokenizer, row, ids, chat.tokenizer.encode(header, add_special_tokens=False))
            continue
        if masks:
            expected = np.where(mask, ids, -100)
            assert np.array_equal(labels_for(row.ids, row.token_tags, table), expected), conversation


@pytest.mark.parametrize("template", ["starchat", "chatml"])
@pytest.mark.parametrize("name", BUILDERS)
def test_ids_and_mask_of_stock_transformers(name: str, template: str) -> None:
    chat = make_format(template, "Be brief.", copy.deepcopy(built(name).tokenizer))
    batch = [one for one in conversations(500, roles_of(template), forged=False) if one.messages]
    # Stock finds its mask by the first character of an answer, and gives up where the tokenizer drops that character or
    # cuts it off a token's offsets, as the rest of these do.
    check_against_stock(chat, batch, masks=name in {"byte-level-digits", "llama2", "gemma"})


@pytest.mark.real
@pytest.mark.parametrize("template", ["starchat", "chatml"])
def test_ids_and_mask_on_real_conversations(demo_model: Path, shared_data: Path, template: str) -> None:
    from transformers import AutoTokenizer

    from peftchat.conversations import read_conversations

    chat = make_format(template, None, AutoTokenizer.from_pretrained(demo_model))
    batch = list(read_conversations(shared_data / "oasst_code_151.jsonl"))
    assert len(batch) > 100
    check_against_stock(chat, batch, masks=True)


def test_starchat_refuses_tools_with_the_place() -> None:
    conversation = Conversation((Message("user", "a"), Message("tool", "b")), "data.jsonl:7")
    with pytest.raises(UserError, match=r"data\.jsonl:7: message 2 has the role `tool`") as error:
        list(CHAT_TEMPLATES["starchat"].spans(conversation))
    assert error.value.hint
    chat = make_format("starchat", None, copy.deepcopy(built("byte-level").tokenizer))
    with pytest.raises(TemplateError, match="tool"):
        chat.tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=False)
