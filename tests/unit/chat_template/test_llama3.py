"""The `llama3` template: its text, ids and masks against stock `apply_chat_template`, and a run from recipe to chat."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from peftchat.chat_template.chat_format import ChatFormat, NewToken, make_format
from peftchat.chat_template.loss_mask import labels_for, loss_mask_table
from peftchat.chat_template.templates import CHAT_TEMPLATES, added_token_count
from peftchat.conversation import Conversation, Message
from tests.support.borders import check_borders
from tests.support.cli import peftchat
from tests.support.data import read_json, write_small_talk
from tests.support.models import small_model
from tests.support.random_text import conversations
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_loss, stock_run
from tests.support.tokenizers import BUILDERS, built

BOS = "<|begin_of_text|>"
TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
NAMES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
OPENING = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def llama3(name: str, system: str | None, *, has_tokens: bool) -> ChatFormat:
    """A tokenizer in the format; one that has the tokens got them as Llama 3 has them, BOS among them."""
    tokenizer = copy.deepcopy(built(name).tokenizer)
    if has_tokens:
        added = [AddedToken(token, special=True, normalized=False) for token in (BOS, *TOKENS)]
        tokenizer.add_tokens(added, special_tokens=True)
    return make_format("llama3", system, tokenizer)


def by_hand(conversation: Conversation, system: str | None, *, has_tokens: bool) -> str:
    """The format, written out."""
    turns = [(message.role, message.content) for message in conversation.messages]
    if system is not None and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    blocks = (f"<|start_header_id|>{NAMES[role]}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in turns)
    return (BOS if has_tokens else "") + "".join(blocks)


def batch_of(count: int) -> list[Conversation]:
    """Random conversations that hold none of the template's tokens as text: stock would read them as tokens."""
    return [one for one in conversations(count, forged=False) if one.messages]


@pytest.mark.parametrize("has_tokens", [False, True])
@pytest.mark.parametrize("system", [None, "", "It's {{ system }}\n\\n 日本"])
def test_rendered_text(system: str | None, has_tokens: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat = llama3("byte-level", system, has_tokens=has_tokens)
    chat.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for conversation in batch_of(300):
        expected = by_hand(conversation, system, has_tokens=has_tokens)
        assert "".join(span.text for span in chat.template.spans(conversation)) == expected
        messages = conversation.as_dicts()
        assert saved.apply_chat_template(messages, tokenize=False) == expected
        assert saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected + OPENING


@pytest.mark.parametrize("has_tokens", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_ids_and_mask_of_stock_transformers(name: str, has_tokens: bool) -> None:
    chat = llama3(name, "Be brief.", has_tokens=has_tokens)
    batch = batch_of(300)
    stock = chat.tokenizer.apply_chat_template(
        [conversation.as_dicts() for conversation in batch], return_assistant_tokens_mask=True, return_dict=True
    )
    table = loss_mask_table("answers")
    examples = chat.encoder().encode(batch)
    for conversation, example, ids, mask in zip(
        batch, examples, stock["input_ids"], stock["assistant_masks"], strict=True
    ):
        if example.ids.tolist() != ids:
            # The whole text may merge the line breaks of a header otherwise than the prompt that ends with them.
            check_borders(chat.tokenizer, example, ids, chat.tokenizer.encode(OPENING, add_special_tokens=False))
            continue
        # Stock finds its mask by the characters of an answer, which not all of these tokenizers report.
        if name in {"byte-level-digits", "llama2", "gemma"}:
            labels = labels_for(example.ids, example.token_tags, table)
            assert np.array_equal(labels, np.where(mask, ids, -100)), conversation


def test_missing_tokens_are_added_in_order_and_bos_is_not() -> None:
    tokenizer = copy.deepcopy(built("byte-level").tokenizer)
    first = len(tokenizer)
    chat = make_format("llama3", None, tokenizer)
    assert list(chat.new_tokens) == [NewToken(token, first + place) for place, token in enumerate(TOKENS)]
    assert added_token_count("llama3") == len(TOKENS) == len(tokenizer) - first
    assert all(token.description for token in chat.new_tokens)
    assert (tokenizer.eos_token, BOS in tokenizer.get_vocab()) == ("<|eot_id|>", False)
    assert not llama3("byte-level", None, has_tokens=True).new_tokens


def test_bos_is_the_first_id_and_never_a_target() -> None:
    chat = llama3("byte-level", None, has_tokens=True)
    conversation = Conversation((Message("user", "a"), Message("assistant", "b")))
    (example,) = chat.encoder().encode([conversation])
    assert chat.tokenizer.convert_ids_to_tokens(int(example.ids[0])) == BOS
    labels = labels_for(example.ids, example.token_tags, loss_mask_table("answers_and_headers"))
    trained = [chat.tokenizer.encode(text, add_special_tokens=False) for text in (OPENING, "b<|eot_id|>")]
    assert labels[labels != -100].tolist() == trained[0] + trained[1]
    assert CHAT_TEMPLATES["llama3"].bos_token == BOS


def spelled(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_a_run_from_recipe_to_chat(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base, data, run = small_model(), write_small_talk(tmp_path / "data.jsonl"), tmp_path / "run"
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", base, data, data, run, chat={"template": "llama3", "new_token_init": "description"}
    )
    done = peftchat("train", str(recipe))
    assert done.returncode == 0, done.stderr
    facts = read_json(run / "run.json")
    assert [token["token"] for token in facts["new_tokens"]] == TOKENS
    assert all(token["seen"] for token in facts["new_tokens"])
    assert facts["new_tokens"][-1]["output_moved"] > 0
    assert facts["new_tokens"][-1]["id"] in read_json(run / "generation_config.json")["eos_token_id"]
    assert "`<|eot_id|>`" in (run / "README.md").read_text(encoding="utf-8")

    model, tokenizer = stock_run(run, base, "lora")
    assert stock_loss(model, tokenizer, data) == pytest.approx(facts["eval_loss"], rel=1e-4)

    done = peftchat("mask", str(recipe), "--rows", "all", "--json")
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(run)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    records = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    for line, messages in zip(lines, records, strict=True):
        first = [message["role"] for message in messages].index("assistant")
        asked = tokenizer.apply_chat_template(messages[:first], add_generation_prompt=True)["input_ids"]
        assert line["input_ids"][: len(asked)] == asked
        assert spelled(line["input_ids"], tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
        answers = [message["content"] + "<|eot_id|>" for message in messages if message["role"] == "assistant"]
        trained = [token for token, label in zip(line["input_ids"], line["labels"], strict=True) if label != -100]
        assert spelled(trained, tokenizer) == "".join(answers)

    done = peftchat("chat", str(run), "--prompt", "the cat", "--greedy", "--max-new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["tokens"] <= 4
