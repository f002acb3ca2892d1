"""Encoding speed under models' own templates: peftchat against stock `apply_chat_template`, row by row.

    python scripts/bench_templates.py TEMPLATES --model FOLDER --data code=code.jsonl languages=multilingual.jsonl
    python scripts/bench_templates.py TEMPLATES --model FOLDER --kinds tools --only Qwen3 --profile

TEMPLATES is a folder of `.jinja` files; the sdist of llama-cpp-python on PyPI carries published ones. FOLDER has the
tokenizer, to which the special tokens of each template are added. Stock makes the ids of one example per conversation
and no mask; ours makes as many examples as the template needs, with masks. Both take turns in one process, and the time
is that of the processor, all threads together. Answers and prompts of every example are compared with stock's before.
"""

import argparse
import gc
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from template_cases import special_tokens_of

from peftchat.conversation import Conversation, Message, ToolCall

TEMPLATES = {
    "ChatML": "",
    "Qwen2.5": "Qwen-Qwen2.5-7B-Instruct",
    "Qwen3": "Qwen-Qwen3-0.6B",
    "Llama 3.1": "meta-llama-Llama-3.1-8B-Instruct",
    "Hermes 3": "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
}
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' + (c.function.arguments | tojson) + "
    "'</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_FIELDS = ["city", "query", "limit", "date", "user_id", "path", "currency", "language", "amount", "topic"]
_WORDS = [
    "the", "a", "of", "to", "and", "in", "is", "for", "with", "on", "that", "this", "value", "result", "file",
    "list", "error", "network", "price", "weather", "market", "train", "house", "question", "number", "small",
    "large", "green", "quickly", "slowly", "perhaps", "because", "therefore", "compute", "check", "return",
    "read", "write", "table", "chapter", "river", "engine", "signal", "memory", "window", "garden", "letter",
    "music", "market", "season", "doctor", "travel",
]  # fmt: skip


class Source:
    """Random conversations: words, definitions of tools, calls."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._sets = [self._tools(self._draw.randint(2, 5), number) for number in range(3)]

    def text(self, low: int, high: int) -> str:
        """Return sentences of that many words."""
        words = self._draw.choices(_WORDS, k=self._draw.randint(low, high))
        for at in range(9, len(words), 11):
            words[at] += "."
        return " ".join(words).capitalize() + "."

    def _tools(self, count: int, number: int) -> list[dict[str, Any]]:
        return [self._tool(f"tool_{number}_{index}") for index in range(count)]

    def _tool(self, name: str) -> dict[str, Any]:
        fields = self._draw.sample(_FIELDS, self._draw.randint(1, 4))
        properties = {field: {"type": "string", "description": self.text(4, 12)} for field in fields}
        parameters = {"type": "object", "properties": properties, "required": fields[:1]}
        function = {"name": name, "description": self.text(6, 20), "parameters": parameters}
        return {"type": "function", "function": function}

    def short(self) -> Conversation:
        """Return one to four exchanges of a few words each."""
        turns = []
        for _ in range(self._draw.randint(1, 4)):
            turns += [Message("user", self.text(2, 8)), Message("assistant", self.text(1, 8))]
        return Conversation(tuple(turns))

    def rich(self, *, tools: bool, reasoning: bool, own: bool = False) -> Conversation:
        """Return one to three exchanges with calls, reasoning, or both, and one of three lists of tools, or its own."""
        given = self._draw.choice(self._sets)
        if own:
            given = self._tools(self._draw.randint(2, 5), self._draw.randrange(10**6))
        turns = [Message("system", self.text(8, 30))] if self._draw.random() < 0.5 else []
        for _ in range(self._draw.randint(1, 3)):
            turns.append(Message("user", self.text(6, 40)))
            thought = (lambda: self.text(20, 120)) if reasoning else (lambda: None)
            if tools and self._draw.random() < 0.8:
                for _ in range(self._draw.randint(1, 2)):
                    function = self._draw.choice(given)["function"]
                    arguments = {name: self.text(1, 4) for name in function["parameters"]["properties"]}
                    key = f"call{self._draw.randrange(10**5):05}"
                    call = ToolCall(function["name"], json.dumps(arguments), key)
                    turns.append(Message("assistant", "", (call,), None, None, thought()))
                    result = json.dumps({"result": self.text(5, 40), "rows": self._draw.randint(1, 9)})
                    turns.append(Message("tool", result, (), key, function["name"]))
            turns.append(Message("assistant", self.text(10, 80), (), None, None, thought()))
        return Conversation(tuple(turns), tools=json.dumps(given) if tools else None)


def conversations_of(options: argparse.Namespace) -> dict[str, list[Conversation]]:
    """Return the conversations of each kind."""
    from peftchat.conversations import read_conversations

    source, count = Source(7), options.rows
    found = {}
    for one in options.data:
        name, _, path = one.partition("=")
        found[name] = list(itertools.islice(read_conversations(path), count))
    found["short turns"] = [source.short() for _ in range(count)]
    found["tools"] = [source.rich(tools=True, reasoning=False) for _ in range(count)]
    found["tools of their own"] = [source.rich(tools=True, reasoning=False, own=True) for _ in range(count)]
    found["reasoning"] = [source.rich(tools=False, reasoning=True) for _ in range(count)]
    found["tools and reasoning"] = [source.rich(tools=True, reasoning=True) for _ in range(count)]
    return {kind: given for kind, given in found.items() if not options.kinds or kind in options.kinds}


def tokenizer_for(name: str, source: str, model: str) -> Any:
    """Return the model's tokenizer with the template, and with its special tokens added."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    special, bos, eos = special_tokens_of(name, source)
    tokenizer.add_tokens([AddedToken(one, special=True, normalized=False) for one in special], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, eos, source
    return tokenizer


def check(tokenizer: Any, given: Sequence[Conversation], batch: Any) -> list[tuple[int, int]]:
    """Compare the ids before each trained answer, and the answer, with stock's.

    Returns:
        Each example as the number of its conversation and of its last message.
    """
    import numpy as np

    from peftchat.chat_template.loss_mask import loss_mask_table

    table = loss_mask_table("answers")
    special = set(tokenizer.convert_tokens_to_ids(list(tokenizer.all_special_tokens)))
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    for number, rows in batch.by_conversation():
        messages, tools = given[number].as_dicts(), given[number].tool_schemas()
        starts: list[tuple[int, int, int]] = []
        for place, row in enumerate(rows):
            trained = np.concatenate([[0], table[row.token_tags].astype(int), [0]])
            edges = np.flatnonzero(np.diff(trained))
            starts += [(place, int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
        assert len(starts) == len(answers), (messages, len(starts))
        for (place, start, stop), index in zip(starts, answers, strict=True):
            row = rows[place]
            prompt = tokenizer.apply_chat_template(
                messages[:index], tools=tools, add_generation_prompt=True, return_dict=False
            )
            assert row.ids[:start].tolist() == list(prompt), tokenizer.decode(row.ids)
            full = tokenizer.apply_chat_template(messages[: index + 1], tools=tools, tokenize=False)
            written = tokenizer.decode(row.ids[start:stop])
            text = tokenizer.decode(prompt) + written
            assert full.startswith(text) or written.endswith(tuple(map(tokenizer.decode, special))), (full, text)
            ends[number, place] = number, index
    return list(ends.values())


def measure(options: argparse.Namespace, tokenizer: Any, given: Sequence[Conversation]) -> dict[str, float]:
    """Return the least seconds of each contender, and the number of our examples."""
    from peftchat.chat_template.chat_format import make_format
    from peftchat.dataset.encode import _seldom_collected, encode_ahead

    rows = [(one.as_dicts(), one.tool_schemas()) for one in given]
    clock = time.perf_counter if options.cores else time.process_time
    encoder = make_format("model", None, tokenizer).encoder()
    ends = check(tokenizer, given, encoder.batch(given))

    def stock() -> None:
        for messages, tools in rows:
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)

    def stock_all() -> None:
        for number, last in ends:
            messages, tools = rows[number]
            tokenizer.apply_chat_template(messages[: last + 1], tools=tools, tokenize=True, return_dict=False)

    def ours() -> None:
        if options.cores:
            for _ in encode_ahead(encoder, given, encoder.batch):
                pass
            return
        # The caches of a first batch of other conversations are warm, those of these conversations are not.
        with _seldom_collected():
            encoder.batch(given)

    contenders = {"stock": stock, "stock, all": stock_all, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        encoder = make_format("model", None, tokenizer).encoder()
        encoder.batch(given[:8])
        for name, contender in contenders.items():
            gc.collect()
            before = clock()
            contender()
            seconds[name].append(clock() - before)
    return {**{name: min(found) for name, found in seconds.items()}, "examples": len(ends)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("templates", type=Path, help="folder of .jinja files")
    parser.add_argument("--model", required=True, help="folder with the tokenizer")
    parser.add_argument("--data", nargs="*", default=[], help="NAME=FILE: further conversations")
    parser.add_argument("--rows", type=int, default=300, help="conversations of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[], help="templates")
    parser.add_argument("--profile", action="store_true", help="instead: where the time of ours goes")
    parser.add_argument("--cores", action="store_true", help="instead: time on the clock, ours on all cores")
    options = parser.parse_args()
    print("| conversations | template | stock | stock, all | ours | examples | stock / ours | stock, all / ours |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, given in conversations_of(options).items():
        for name, file in TEMPLATES.items():
            if (options.only and name not in options.only) or (name == "Hermes 3" and "tools" not in kind):
                continue
            if name in ("Llama 3.1", "Hermes 3", "Qwen2.5") and "reasoning" in kind:
                continue  # these have no place for reasoning
            source = CHATML if not file else (options.templates / f"{file}.jinja").read_text(encoding="utf-8")
            tokenizer = tokenizer_for(file, source, options.model)
            if options.profile:
                profile(tokenizer, given)
                continue
            found = measure(options, tokenizer, given)
            stock, every, ours = found["stock"], found["stock, all"], found["ours"]
            print(
                f"| {len(given):,} {kind} | {name} | {stock:.2f} | {every:.2f} | {ours:.2f} | {found['examples']:,} | "
                f"{stock / ours:.2f} | {every / ours:.2f} |",
                flush=True,
            )


def profile(tokenizer: Any, given: Sequence[Conversation]) -> None:
    """Print the functions in which ours spends its time."""
    import cProfile
    import pstats

    from peftchat.chat_template.chat_format import make_format

    encoder = make_format("model", None, tokenizer).encoder()
    encoder.batch(given[:8])
    watched = cProfile.Profile(time.process_time)
    watched.runcall(encoder.batch, given)
    pstats.Stats(watched).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
