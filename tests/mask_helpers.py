"""A small tokenizer, conversations and recipes for the tests of what a recipe trains."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "What is this?"), ("assistant", "A test.\n\n```python\nprint(1)\n```")],
    [
        ("system", "Be brief."),
        ("user", "Hello 😀 日本"),
        ("assistant", "Résumé & <b>done</b>."),
        ("user", "Say <|end|> again"),
        ("assistant", "<|assistant|> is only text here"),
    ],
    [("user", "one two three"), ("assistant", "four"), ("user", "five six"), ("assistant", "seven eight nine")],
]


def make_tokenizer_folder(folder: Path) -> Path:
    """A byte-level tokenizer of a few hundred tokens, and nothing else of a model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator([content for conversation in CONVERSATIONS for _, content in conversation], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def write_conversations(path: Path, conversations: Sequence[Sequence[tuple[str, str]]]) -> Path:
    """The conversations in messages form, one a line."""
    rows = [{"messages": [{"role": role, "content": content} for role, content in one]} for one in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, model: Path, train: Path, **sections: dict[str, Any]) -> Path:
    """A LoRA recipe; JSON is YAML."""
    recipe: dict[str, Any] = {
        "model": {"name": str(model)},
        "method": "lora",
        "output_dir": str(path.parent / "run"),
        **sections,
    }
    recipe["data"] = {"train": [{"path": str(train)}], **sections.get("data", {})}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path
