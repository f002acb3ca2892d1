"""Conversations in files, and what runs leave in JSON."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Turns = Sequence[tuple[str, str]]
"""A conversation as (role, content) pairs."""

_SENTENCE = "the cat sat on a mat and then it saw two dogs run over green hills to find some fresh water there"
WORDS = tuple(re.findall(r"\w+", _SENTENCE))

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
"""Three conversations with code, several scripts and text that looks like special tokens."""


def write_conversations(path: Path, conversations: Sequence[Turns]) -> Path:
    """Write conversations in messages form, one per line; return the path."""
    records = [{"messages": [{"role": role, "content": content} for role, content in one]} for one in conversations]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def small_talk(count: int = 24, seed: int = 0) -> list[list[tuple[str, str]]]:
    """Return conversations of one to three rounds over `WORDS`, a third of them with a system message."""
    pick = random.Random(seed)

    def say() -> str:
        return " ".join(pick.choices(WORDS, k=pick.randint(2, 9)))

    conversations = []
    for number in range(count):
        turns = [("system", say())] if number % 3 == 0 else []
        for _ in range(pick.randint(1, 3)):
            turns += [("user", say()), ("assistant", say())]
        conversations.append(turns)
    return conversations


def write_small_talk(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Write `small_talk` to a file; return the path."""
    return write_conversations(path, small_talk(count, seed))


def read_json(path: Path) -> Any:
    """Return the JSON in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[Any]:
    """Return the JSON of each line of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
