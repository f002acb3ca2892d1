"""Encoding speed: peftchat against `datasets.map` over `apply_chat_template`, and against the tokenizer alone.

    python scripts/bench_data.py DIALOGUES --model FOLDER --rows 20000
    python scripts/bench_data.py DIALOGUES --model FOLDER --rows 1000000 --memory

All contenders make ids and the mask of the answers from the same dialogues on the same cores, in alternation, and
their results are compared. The baseline starts from a data set in memory: row by row, as TRL calls it, in one process
and in one a core; and in batches, which lets the tokenizer use its threads. Ours starts from a file on disk and ends
with rows on disk. The tokenizer alone gets rendered text and makes ids only: no encoding can be faster.

Processor time counts all processes and threads; on a machine that others use it is the figure to look at.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

Ids = list[list[int]]
OURS = "peftchat, file to rows on disk"


@dataclass(frozen=True)
class Encoded:
    """Ids and the mask of the answers, for the comparison; None where a contender makes none."""

    ids: Ids
    mask: Ids | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dialogues", help="a file in any form that peftchat reads")
    parser.add_argument("--model", required=True, help="folder with the tokenizer")
    parser.add_argument("--rows", type=int, default=20_000, help="dialogues; the file's are repeated to fill them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="instead: peak memory at a tenth of the rows and at all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(prepare_and_weigh(options.measure, options.model)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        if options.memory:
            compare_memory(options, Path(folder))
        else:
            compare_speed(options, Path(folder))


def write_rows(source: str, path: Path, rows: int) -> list[list[dict[str, str]]]:
    """Write `rows` dialogues without special-token text, each a little different; return one of each."""
    from peftchat.sources import read_conversations

    conversations = [one.as_dicts() for one in read_conversations(source)]
    conversations = [one for one in conversations if not any("<|" in message["content"] for message in one)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(json.dumps({"messages": conversations[number % len(conversations)]}) + "\n")
    return conversations


def recipe_for(path: Path, model: str) -> Any:
    from peftchat.recipe import Recipe

    return Recipe.model_validate(
        {
            "model": {"name": model},
            "method": "lora",
            "adapter": {},
            "data": {"train": [{"path": str(path)}], "max_length": 1_000_000},
            "output_dir": "unused",
        }
    )


def compare_speed(options: argparse.Namespace, folder: Path) -> None:
    path = folder / "rows.jsonl"
    one_of_each = write_rows(options.dialogues, path, options.rows)
    cores = len(os.sched_getaffinity(0))
    contenders = make_contenders(path, one_of_each, options, cores, folder)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    work: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, Encoded] = {}
    for round_number in range(options.rounds + 1):
        for name in names:
            started, worked = time.perf_counter(), processor_time()
            finish = contenders[name]()
            if round_number:  # the first round warms caches up
                seconds[name].append(time.perf_counter() - started)
                work[name].append(processor_time() - worked)
            else:
                results[name] = finish()
    check_equal(results)
    tokens = sum(map(len, results["tokenizer alone"].ids))
    print(f"{options.rows:,} dialogues, {tokens:,} tokens, {cores} cores, median of {options.rounds} rounds")
    ours = seconds[OURS]
    for name in names:
        middle = statistics.median(seconds[name])
        ratios = sorted(other / mine for other, mine in zip(seconds[name], ours, strict=True))
        works = sorted(other / mine for other, mine in zip(work[name], work[OURS], strict=True))
        print(
            f"{name:37} {middle:7.2f} s {options.rows / middle:9,.0f} rows/s {tokens / middle:11,.0f} tokens/s   "
            f"{statistics.median(ratios):5.2f} x ours ({ratios[0]:.2f} to {ratios[-1]:.2f})   "
            f"processor {statistics.median(work[name]):6.2f} s, {statistics.median(works):5.2f} x ours"
        )


def processor_time() -> float:
    """Seconds of processor time of this process and its ended children."""
    return sum(os.times()[:4])


def make_contenders(
    path: Path, one_of_each: list[list[dict[str, str]]], options: argparse.Namespace, cores: int, folder: Path
) -> dict[str, Callable[[], Callable[[], Encoded]]]:
    """Name -> a run, which returns how to read its result (not timed)."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from peftchat.chatml.registry import make_format
    from peftchat.sources import read_conversations
    from peftchat.training.data import prepare_rows

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chat = make_format("starchat", None, tokenizer)
    recipe = recipe_for(path, options.model)
    messages = [one_of_each[number % len(one_of_each)] for number in range(options.rows)]
    data = Dataset.from_dict({"messages": messages})
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    conversations = list(read_conversations(path))
    encoder = chat.encoder()
    counter = iter(range(10**6))

    def encode_some(batch: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=True, return_attention_mask=False
        )
        return {"input_ids": made["input_ids"], "mask": made["assistant_masks"]}

    def mapped(batched: bool, processes: int | None) -> Callable[[], Callable[[], Encoded]]:
        def run() -> Callable[[], Encoded]:
            made = data.map(
                encode_some,
                batched=batched,
                remove_columns=["messages"],
                num_proc=processes,
                load_from_cache_file=False,
                cache_file_name=str(folder / f"mapped-{next(counter)}.arrow"),
            )
            return lambda: Encoded(made["input_ids"][:], made["mask"][:])

        return run

    def prepared() -> Callable[[], Encoded]:
        os.environ["PEFTCHAT_CACHE"] = str(folder / f"cache-{next(counter)}")
        store = prepare_rows(recipe, chat)["train"].store
        return lambda: of_rows(store)

    def encoded() -> Callable[[], Encoded]:
        rows = []
        for start in range(0, len(conversations), 1024):
            rows += encoder.encode(conversations[start : start + 1024])
        return lambda: of_rows(rows)

    def alone() -> Callable[[], Encoded]:
        ids: Ids = []
        for start in range(0, len(texts), 1024):
            batch = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 1024], add_special_tokens=False)
            ids += [item.ids for item in batch]
        return lambda: Encoded(ids, None)

    return {
        "datasets.map, row by row": mapped(False, None),
        f"datasets.map, row by row, {cores} processes": mapped(False, cores),
        "datasets.map, batched": mapped(True, None),
        OURS: prepared,
        "peftchat, encoding alone": encoded,
        "tokenizer alone": alone,
    }


def of_rows(rows: Any) -> Encoded:
    from peftchat.chatml.mask import policy_table

    table = policy_table("answers")
    return Encoded([row.ids.tolist() for row in rows], [table[row.codes].astype(int).tolist() for row in rows])


def check_equal(results: dict[str, Encoded]) -> None:
    expected = results["datasets.map, row by row"]
    for name, result in results.items():
        if result.ids != expected.ids or result.mask not in (None, expected.mask):
            raise SystemExit(f"{name} made other ids or another mask than datasets.map")


def compare_memory(options: argparse.Namespace, folder: Path) -> None:
    for rows in (options.rows // 10, options.rows):
        path = folder / f"rows-{rows}.jsonl"
        write_rows(options.dialogues, path, rows)
        command = [sys.executable, __file__, options.dialogues, "--model", options.model, "--measure", str(path)]
        environment = {**os.environ, "PEFTCHAT_CACHE": str(folder / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        told = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{rows:,} dialogues, {told['tokens']:,} tokens: {told['seconds']:.1f} s, "
            f"{told['tokens'] / told['seconds']:,.0f} tokens/s, peak {told['peak'] / 2**20:,.0f} MiB "
            f"({(told['peak'] - told['before']) / 2**20:,.0f} MiB above the start)"
        )
        path.unlink()


def prepare_and_weigh(path: str, model: str) -> dict[str, float]:
    """Prepare a file's rows; time, tokens and peak resident memory in bytes."""
    import resource

    from transformers import AutoTokenizer

    from peftchat.chatml.registry import make_format
    from peftchat.training.data import prepare_rows

    chat = make_format("starchat", None, AutoTokenizer.from_pretrained(model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    stats = prepare_rows(recipe_for(Path(path), model), chat)["train"].stats
    return {
        "tokens": stats.tokens,
        "seconds": time.perf_counter() - started,
        "before": before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
