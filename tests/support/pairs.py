"""Preference pairs in files, and a run of them that is open before its first step."""

import json
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from peftchat.recipe import load_recipe
from peftchat.training.build_trainer import build_trainer, sft_config
from peftchat.training.context import TrainOptions, open_context
from peftchat.training.model import load_trainable_model
from peftchat.training.preference_trainer import PreferenceTrainer
from tests.support.data import WORDS, read_json_lines
from tests.support.models import random_model
from tests.support.recipes import write_training_recipe
from tests.support.tokenizers import train_byte_level


def write_pairs(path: Path, count: int = 12, seed: int = 0, *, rounds: int = 1) -> Path:
    """Write pairs that a rule tells apart: the chosen answer ends with "water", the rejected one with "hills".

    Args:
        path: the file.
        count: pairs.
        seed: of the words.
        rounds: earlier rounds of every third prompt.
    """
    pick = random.Random(seed)

    def say(most: int) -> str:
        return " ".join(pick.choices(WORDS, k=pick.randint(2, most)))

    records = []
    for number in range(count):
        prompt: Any = say(6)
        if number % 3 == 0 and rounds > 1:
            turns = [[("user", say(5)), ("assistant", say(5))] for _ in range(rounds - 1)]
            earlier = [{"role": role, "content": text} for pair in turns for role, text in pair]
            prompt = [*earlier, {"role": "user", "content": prompt}]
        records.append({"prompt": prompt, "chosen": f"{say(8)} water", "rejected": f"{say(8)} hills"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_labels(path: Path, count: int, seed: int = 0) -> Path:
    """Write answers that end with "water" as good ones, and those that end with "hills" as bad ones, in turn."""
    records = read_json_lines(write_pairs(path, count, seed))
    for number, record in enumerate(records):
        chosen, rejected = record.pop("chosen"), record.pop("rejected")
        record |= {"completion": rejected if number % 3 == 2 else chosen, "label": number % 3 != 2}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_chatml_base(folder: Path) -> Path:
    """Save a base whose tokenizer has the tokens of the template, so that stock libraries need only the adapter."""
    tokens = ["<eos>", "<|im_start|>", "<|im_end|>"]
    tokenizer = train_byte_level([" ".join(WORDS)] * 4, 320, tokens)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    random_model("llama", tokenizer.get_vocab_size(), tied=False).save_pretrained(folder)
    return folder


def pair_recipe(folder: Path, base: Path, train: Path, held_out: Path | None, **sections: Any) -> Path:
    """Write a recipe of a short preference run into a folder; return its path."""
    run = folder / "run"
    sections = {"objective": "dpo", **sections}
    return write_training_recipe(folder / "recipe.yaml", base, train, held_out, run, **sections)


def open_trainer(recipe: Path, *overrides: str) -> PreferenceTrainer:
    """Return the trainer of a recipe as it is before its first step."""
    context = open_context(load_recipe(recipe, overrides), TrainOptions())
    config = sft_config(context)
    trainer = build_trainer(context, load_trainable_model(context), config)
    assert isinstance(trainer, PreferenceTrainer)
    return trainer
