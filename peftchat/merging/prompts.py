"""Real prompts for the comparison, as token ids."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from peftchat.errors import UserError
from peftchat.merging.run import Run

MOST_PROMPTS = 20
MOST_TOKENS = 64
"""In a prompt: long enough for every layer's attention to matter, short enough that twenty fit one batch."""

_BUILT_IN = (
    "How do I read a file line by line in Python?",
    "Write a function that returns the n-th Fibonacci number.",
    "Explain the difference between a list and a tuple, with an example of each.",
    "What does HTTP status 404 mean, and how is it different from 500?",
    "Translate to French: the quick brown fox jumps over the lazy dog.",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "Why is the sky blue? Answer in one sentence.",
    "¿Cuál es la capital de Perú? 東京はどこですか。 Где находится Байкал?",
)


def prompts(run: Run, tokenizer: Any, special: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Prompts as ids: dialogues of the run's held-out data, built-in ones after them, and every special token.

    Args:
        run: the run whose data is used.
        tokenizer: the merged model's; None if it has none, and then ids are spread over the vocabulary.
        special: ids with trained rows; each occurs in at least one prompt, between ordinary tokens.
        vocabulary: number of rows of the embedding.
    """
    if tokenizer is None:
        found = [[(97 * start + 31 * place) % vocabulary for place in range(32)] for start in range(8)]
    else:
        found = [_encode(tokenizer, messages) for messages in islice(_messages(run), MOST_PROMPTS)]
    found = [[index for index in ids if index < vocabulary][:MOST_TOKENS] for ids in found]
    found = [ids for ids in found if len(ids) > 1]
    seen = {index for ids in found for index in ids}
    ordinary = next((index for index in found[0] if index not in special), 0) if found else 0
    unseen = [index for index in special if index not in seen]
    for start in range(0, len(unseen), MOST_TOKENS // 2):
        found.append([token for index in unseen[start : start + MOST_TOKENS // 2] for token in (ordinary, index)])
    return found


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder, None if it has none."""
    from transformers import AutoTokenizer

    if not ((folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()):
        return None
    return AutoTokenizer.from_pretrained(str(folder))


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])


def _messages(run: Run) -> Iterator[list[dict[str, str]]]:
    if run.recipe is not None:
        with suppress(UserError):  # the data may have moved since; the comparison does not depend on it
            yield from _of_run(run)
    for text in _BUILT_IN:
        yield [{"role": "user", "content": text}]


def _of_run(run: Run) -> Iterator[list[dict[str, str]]]:
    """The run's held-out dialogues; those it trained on where it held out none."""
    from peftchat.conversations import fit_split, read_sources

    assert run.recipe is not None
    data, seed = run.recipe.recipe.data, run.recipe.recipe.training.seed
    conversations = read_sources(data.eval or data.train, seed)
    if data.eval is None and data.eval_fraction is not None:
        split = fit_split(read_sources(data.train, seed), data.eval_fraction, seed)
        conversations = filter(split.is_eval, conversations)
    for conversation in conversations:
        yield [message for message in conversation.as_dicts() if message["role"] in ("user", "assistant")]
