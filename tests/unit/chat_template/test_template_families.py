"""Every trained answer stands behind the prompt that the model gets for it: ten families, random conversations.

`PEFTCHAT_TEMPLATE_CONVERSATIONS` sets how many conversations each family gets; 1,000 make the full check of 10,000.
"""

import copy
import itertools
import os
from typing import Any

import pytest
from tokenizers import AddedToken

from peftchat.chat_template import encoder as encoder_module
from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.conversation import Conversation
from peftchat.errors import UserError
from tests.support.template_families import FAMILIES, SPECIAL, rich_conversations
from tests.support.tokenizers import built

COUNT = int(os.environ.get("PEFTCHAT_TEMPLATE_CONVERSATIONS", "100"))
TABLE = loss_mask_table("answers")


def tokenizer_of(family: str) -> Any:
    tokenizer = copy.deepcopy(built("byte-level-digits").tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = FAMILIES[family]
    return tokenizer


def trained_runs(row: EncodedExample) -> list[tuple[int, list[int]]]:
    """Where each trained run starts, and its ids."""
    trained = TABLE[row.token_tags].tolist()
    runs = []
    for kind, group in itertools.groupby(range(len(trained)), lambda at: trained[at]):
        places = list(group)
        if kind:
            runs.append((places[0], row.ids[places].tolist()))
    return runs


def check(tokenizer: Any, conversation: Conversation, rows: list[EncodedExample], *, ids_too: bool) -> None:
    messages, tools = conversation.as_dicts(), conversation.tool_schemas()
    runs = [(row, *run) for row in rows for run in trained_runs(row)]
    expected = [
        index
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.train is not False
    ]
    assert len(runs) == len(expected), conversation
    for (row, start, written), index in zip(runs, expected, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:index], tools=tools, add_generation_prompt=True, tokenize=False
        )
        before = row.ids[:start].tolist()
        assert tokenizer.decode(before) == prompt, conversation
        if ids_too:
            assert before == tokenizer.encode(prompt, add_special_tokens=False), conversation
        full = tokenizer.apply_chat_template(messages[: index + 1], tools=tools, tokenize=False)
        spelled = tokenizer.decode(written)
        end = tokenizer.decode(written[-1:])
        assert full.startswith(prompt)
        behind = full[len(prompt) :]
        assert behind.startswith(spelled) or behind == spelled.removesuffix(end), (conversation, spelled, behind)
        assert end in SPECIAL or end == tokenizer.eos_token
        message = conversation.messages[index]
        for text in (message.content, message.reasoning or "", *(call.name for call in message.tool_calls)):
            assert text.strip() in spelled, conversation


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_follow_their_prompts(family: str, hostile: bool) -> None:
    chat = make_format("model", None, tokenizer_of(family))
    encoder = chat.encoder()
    done = 0
    for conversation in rich_conversations(COUNT // 2, COUNT, hostile=hostile):
        plain = not conversation.tools and not any(message.reasoning for message in conversation.messages)
        try:
            rows = encoder.encode([conversation])
        except UserError as error:
            assert not plain or (family == "gemma" and "no system role" in error.message), error
            continue
        if any(message.role == "assistant" and message.train is not False for message in conversation.messages):
            check(chat.tokenizer, conversation, rows, ids_too=not hostile)
        done += 1
    assert done > COUNT / 10


@pytest.mark.parametrize("family", ["chatml", "qwen3"])
def test_it_is_no_matter_which_ids_of_the_templates_text_are_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions of tools are long text of the template, and are encoded with what stands behind them."""
    given = rich_conversations(60, 3, hostile=False)
    given = [one for one in given if not any(message.reasoning for message in one.messages)]
    found = []
    for kept in (0, 10**9):
        monkeypatch.setattr(encoder_module, "_LONGEST_KEPT", kept)
        rows = make_format("model", None, tokenizer_of(family)).encoder().batch(given)
        found.append((rows.ids.tolist(), rows.token_tags.tolist(), rows.offsets.tolist()))
    assert found[0] == found[1]
