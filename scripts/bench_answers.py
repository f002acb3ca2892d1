"""Answers in batches beside one by one: CPU seconds, and whether the answers are the same.

    python scripts/bench_answers.py --base .cache/smollm2-135m QUESTIONS

Questions are lines of `.jsonl` with `prompt`. A base is asked by a short dialogue, greedily. Batch sizes take turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from peftchat.answering.batch import Generated, generate_batch
from peftchat.answering.prompting import DialoguePrompting
from peftchat.conversation import Message
from peftchat.serving.chat_model import ChatModel, load_for_chat

TEXT = "Human: Hello, who are you?\n\nAssistant: I am an assistant that answers questions."


def answers(
    chat: ChatModel, prompts: Sequence[Sequence[int]], batch: int, tokens: int
) -> tuple[float, list[Generated]]:
    """Return the CPU seconds of all answers in batches of a size, and the answers."""
    prompting = DialoguePrompting(chat.tokenizer, chat.generation_config, TEXT)
    start = time.process_time()
    made: list[Generated] = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        made += generate_batch(chat, prompting, part, chat.generation_config, tokens, [0] * len(part))
    return time.process_time() - start, made


def main() -> None:
    """Measure every batch size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--base", default=".cache/smollm2-135m")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    lines = args.questions.read_text(encoding="utf-8").splitlines()[: args.count]
    questions = [str(json.loads(line)["prompt"]) for line in lines]
    chat = load_for_chat(args.base, needs_template=False)
    prompting = DialoguePrompting(chat.tokenizer, chat.generation_config, TEXT)
    # Answers of similar prompts share a batch, as `peftchat generate` has it.
    prompts = sorted((prompting.encode((Message("user", one),), 1024).ids for one in questions), key=len)
    seconds: dict[int, list[float]] = {batch: [] for batch in args.batches}
    found: dict[int, list[list[int]]] = {}
    for _ in range(args.rounds):
        for batch in args.batches:
            taken, made = answers(chat, prompts, batch, args.tokens)
            seconds[batch].append(taken)
            found[batch] = [one.ids for one in made]
    first = args.batches[0]
    total = sum(map(len, found[first]))
    print(f"{len(prompts)} questions, {total} tokens of answers, {torch.get_num_threads()} threads")
    print("| batch | CPU seconds | against one by one | same answers |\n|---:|---:|---:|---:|")
    for batch in args.batches:
        same = sum(a == b for a, b in zip(found[batch], found[first], strict=True))
        gain = statistics.median(seconds[first]) / statistics.median(seconds[batch])
        shown = ", ".join(f"{taken:.1f}" for taken in seconds[batch])
        print(f"| {batch} | {shown} | {gain:.1f} x | {same} of {len(prompts)} |")


if __name__ == "__main__":
    main()
