"""Reasoning, calls and empty reasoning are left out of the loss by recipe keys, and stay in the text."""

import copy
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.loss_mask import LossOn, LossPolicy, loss_mask_table, role_of
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from tests.support.template_families import FAMILIES, SPECIAL, rich_conversations
from tests.support.tokenizers import built

EXTRA = [
    LossPolicy(),
    LossPolicy(train_reasoning=False),
    LossPolicy(train_tool_calls=False),
    LossPolicy(train_empty_reasoning=False),
    LossPolicy("everything", train_reasoning=False, train_tool_calls=False),
    LossPolicy("last_answer", train_reasoning=False),
    LossPolicy("answers_and_headers", train_tool_calls=False),
]


def chat_of(template: str) -> Any:
    tokenizer = copy.deepcopy(built("byte-level-digits").tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = FAMILIES.get(template)
    return make_format("model" if template in FAMILIES else template, None, tokenizer)


def marked(conversations: list[Conversation], seed: int) -> list[Conversation]:
    """The conversations with a letter of a script of its own in each kind of text: what a token is of, it shows."""
    draw = random.Random(seed)
    found = []
    for conversation in conversations:
        turns = []
        for message in conversation.messages:
            if message.role == "assistant":
                reasoning = message.reasoning and "ж" * draw.randint(1, 4) + " ж"
                calls = tuple(call._replace(name="λ", arguments='{"λλ": "λ λ"}') for call in message.tool_calls)
                content = message.content and "".join(draw.choices("ש ", k=6)).strip() + "ש"
                message = message._replace(content=content, reasoning=reasoning, tool_calls=calls)
            turns.append(message)
        found.append(Conversation(tuple(turns), conversation.source, conversation.tools))
    return found


def letters(chat: Any, ids: list[int]) -> dict[str, int]:
    text = chat.tokenizer.decode(ids)
    return {letter: text.count(letter) for letter in "жλש"}


@pytest.mark.parametrize("template", ["qwen3", "chatml", "channels", "deepseek", "starchat"])
def test_each_kind_is_trained_unless_its_key_says_otherwise(template: str) -> None:
    chat = chat_of(template)
    encoder = chat.encoder()
    done = 0
    for conversation in marked(rich_conversations(60, 5, hostile=False), 5):
        try:
            examples = encoder.encode([conversation])
        except UserError:
            continue
        answers = [m for m in conversation.messages if m.role == "assistant" and m.train is not False]
        last_index = max(i for i, m in enumerate(conversation.messages) if m.role == "assistant")
        for policy in EXTRA:
            chosen = answers
            if policy.loss_on == "last_answer":
                chosen = [m for m in answers if m is conversation.messages[last_index]]
            table = loss_mask_table(policy)
            trained = [i for e in examples for i in e.ids[table[e.token_tags]].tolist()]
            found = letters(chat, trained)
            expected = {
                "ж": sum((m.reasoning or "").count("ж") for m in chosen) * policy.train_reasoning,
                "λ": sum(len(m.tool_calls) * 5 for m in chosen) * policy.train_tool_calls,
                "ש": sum(m.content.count("ש") for m in chosen),
            }
            assert found == expected, (policy, conversation)
        done += 1
    assert done > 20


@pytest.mark.parametrize("loss_on", ["answers", "answers_and_headers", "last_answer"])
def test_definitions_results_and_system_text_are_no_targets(loss_on: LossOn) -> None:
    chat = chat_of("qwen3")
    table = loss_mask_table(LossPolicy(loss_on, train_tool_calls=False))
    for conversation in rich_conversations(40, 8, hostile=True):
        for example in chat.encoder().encode([conversation]):
            trained = [tag for tag in example.token_tags.tolist() if table[tag]]
            assert {role_of(tag) for tag in trained} <= {"assistant"}


def test_an_empty_reasoning_is_text_of_the_template_that_a_key_leaves_out() -> None:
    chat = chat_of("qwen3")
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "Hello.")))
    (example,) = chat.encoder().encode([conversation])
    spelled = [
        chat.tokenizer.decode(example.ids[loss_mask_table(LossPolicy(train_empty_reasoning=flag))[example.token_tags]])
        for flag in (True, False)
    ]
    assert spelled == ["<think>\n\n</think>\n\nHello.<|im_end|>", "Hello.<|im_end|>"]


@pytest.mark.parametrize("template", ["qwen3", "starchat"])
def test_reasoning_and_calls_within_the_content_are_of_their_kind(template: str) -> None:
    chat = chat_of(template)
    call = '\n<tool_call>\n{"name": "λ"}\n</tool_call>'
    content = f"<think>\nж ж\n</think>\n\nש.{call}"
    conversation = Conversation((Message("user", "Hi"), Message("assistant", content)))
    if template == "qwen3":
        answer = Message("assistant", content[content.index("ש") :], reasoning="ж ж")
        conversation = Conversation((Message("user", "Hi"), answer))
    (example,) = chat.encoder().encode([conversation])
    for policy, kept in (
        (LossPolicy(), {"ж": 2, "λ": 1, "ש": 1}),
        (LossPolicy(train_reasoning=False), {"ж": 0, "λ": 1, "ש": 1}),
        (LossPolicy(train_tool_calls=False), {"ж": 2, "λ": 0, "ש": 1}),
    ):
        assert letters(chat, example.ids[loss_mask_table(policy)[example.token_tags]].tolist()) == kept


def test_the_marks_between_reasoning_and_answer_stay_trained() -> None:
    chat = chat_of("channels")
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "2.", reasoning="One.")))
    (example,) = chat.encoder().encode([conversation])
    table = loss_mask_table(LossPolicy(train_reasoning=False))
    trained = table[example.token_tags]
    spelled = chat.tokenizer.decode(example.ids[trained])
    assert spelled == "<|start|>assistant<|channel|>final<|message|>2.<|return|>"
    everything = chat.tokenizer.decode(example.ids[np.flatnonzero(loss_mask_table("answers")[example.token_tags])])
    assert everything == "<|channel|>analysis<|message|>One.<|end|>" + spelled
