"""Pairs as examples: both answers behind one prompt that is never trained, whatever template writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.dataset.cache import EncodedSplit, load_splits
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.training.context import chat_format_of
from tests.support.models import small_model
from tests.support.pairs import pair_recipe, write_pairs
from tests.support.template_families import FAMILIES, SPECIAL
from tests.support.tokenizers import byte_level


def encoded(folder: Path, records: list[dict[str, Any]], **sections: Any) -> tuple[ChatFormat, EncodedSplit]:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    base = small_model(tied=True)
    recipe = load_recipe(pair_recipe(folder, base, data, None, **sections)).recipe
    chat = chat_format_of(recipe, AutoTokenizer.from_pretrained(base))
    return chat, load_splits(recipe, chat)["train"]


@pytest.mark.parametrize("template", ["starchat", "chatml", "llama3"])
@pytest.mark.parametrize("loss_on", ["answers", "last_answer"])
def test_what_is_trained_is_the_answer_behind_the_generation_prompt(
    template: str, loss_on: str, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "made.jsonl", 9, rounds=3)
    records = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    chat, split = encoded(tmp_path, records, chat={"template": template, "loss_on": loss_on})
    assert split.stats.examples == 9 and len(split.store) == 18 and split.stats.by_source == [9]
    from peftchat.dataset.pairs import PairCollator

    collator = PairCollator(split.store, loss_on=loss_on, layout="padded", pad_token_id=0)
    batch = collator([{"examples": [2 * number, 2 * number + 1]} for number in range(9)])
    assert batch["input_ids"].shape[0] == 18 and batch["examples"].tolist() == list(range(18))
    end = chat.template.end_token
    for number, record in enumerate(records):
        prompt = record["prompt"] if isinstance(record["prompt"], list) else [
            {"role": "user", "content": record["prompt"]}
        ]  # fmt: skip
        before = chat.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        for place, side in enumerate(("chosen", "rejected")):
            row = 2 * number + place
            ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
            trained = [token for token, label in zip(ids, labels, strict=True) if label >= 0]
            assert ids[: len(before)] == before
            assert labels[: len(before)] == [-100] * len(before)
            assert chat.tokenizer.decode(trained) == f"{record[side]}{end}"
            assert batch["target_counts"][row] == len(trained)


def test_pairs_are_left_out_whole_and_counted(tmp_path: Path) -> None:
    long = " ".join(["hills"] * 300)
    records = [
        {"prompt": "a", "chosen": "the cat", "rejected": "the dogs"},
        {"prompt": "b", "chosen": long, "rejected": "short"},
        {"prompt": "c", "chosen": "short", "rejected": long},
        {"prompt": "d", "chosen": "it ran", "rejected": "it sat"},
    ]
    _, split = encoded(tmp_path, records)
    assert split.stats.dropped == {"too_long": 2}
    assert [one.source.rpartition(":")[2] for one in split.store] == ["1", "1", "4", "4"]
    with pytest.raises(UserError, match=r"the pair has an answer that ends at .* tokens") as error:
        encoded(tmp_path, records, data={"truncation": "error"})
    assert str(error.value.where).endswith("train.jsonl:2")


def test_a_bad_record_ends_a_run_with_its_place(tmp_path: Path) -> None:
    records = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    with pytest.raises(UserError, match=r"are the same.*data prepare --pairs") as error:
        encoded(tmp_path, records)
    assert str(error.value.where).endswith("train.jsonl:2")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_other_templates_are_never_trained(family: str, tmp_path: Path) -> None:
    """Also where a template rewrites earlier answers, or writes reasoning: both sides stand behind one prompt."""
    base = tmp_path / "base"
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = FAMILIES[family]
    tokenizer.save_pretrained(base)
    # The other templates refuse reasoning, which they do not write.
    reasons = family in ("qwen3", "channels", "deepseek")
    earlier: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    if reasons:
        earlier[1]["reasoning_content"] = "Greet."
    records = []
    for number in range(6):
        prompt = [*(earlier if number % 2 else []), {"role": "user", "content": f"Question {number}?"}]
        thought = {"reasoning_content": f"Think {number}."} if reasons and number % 3 == 0 else {}
        chosen = {"role": "assistant", "content": f"Yes, {number}.", **thought}
        rejected = {"role": "assistant", "content": "No."}
        records.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = load_recipe(pair_recipe(tmp_path, base, data, None, chat={"template": "model"})).recipe
    chat = chat_format_of(recipe, AutoTokenizer.from_pretrained(base))
    split = load_splits(recipe, chat)["train"]
    assert len(split.store) == 12 and not split.stats.dropped
    trains = loss_mask_table(recipe.chat.loss_policy)
    for number, record in enumerate(records):
        stock = chat.tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True)["input_ids"]
        for example in (split.store[2 * number], split.store[2 * number + 1]):
            trained = trains[example.token_tags]
            assert example.ids[: len(stock)].tolist() == stock
            assert not trained[: len(stock)].any() and trained[len(stock)]
