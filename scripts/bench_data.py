"""Encoding speed: peftchat against `datasets.map` over `apply_chat_template`, and against the tokenizer alone.

    python scripts/bench_data.py CONVERSATIONS --model FOLDER --rows 20000
    python scripts/bench_data.py CONVERSATIONS --model FOLDER --rows 1000000 --memory
    python scripts/bench_data.py CONVERSATIONS --model FOLDER --rows 300000 --memory --steps clean load parquet

All contenders make ids and the mask of the answers from the same conversations on the same cores, in alternation, and
their results are compared. The baseline starts from a data set in memory: row by row, as TRL calls it, in one process
and in one a core; and in batches, which lets the tokenizer use its threads. Ours starts from a file on disk and ends
with rows on disk. The tokenizer alone gets rendered text and makes ids only: no encoding can be faster.

Processor time counts all processes and threads; on a machine that others use it is the figure to look at.

`--memory` instead runs the steps from a file to packed rows, each in a process of its own, on files of three lengths.
`load` is `datasets.load_dataset("json")` on the same file, to compare with `clean` (`data prepare`).
"""

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
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
    parser.add_argument("conversations", help="a file in any form that peftchat reads")
    parser.add_argument("--model", required=True, help="folder with the tokenizer")
    parser.add_argument("--template", default="starchat", help="chat.template: one of ours, `model`, or a .jinja file")
    parser.add_argument("--rows", type=int, default=20_000, help="conversations; the file's are repeated to fill them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="instead: peak memory at 3 %%, 30 %% and all of the rows")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["clean", "encode"], help="of --memory")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(weigh(options.measure, options.model, options.step)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        if options.memory:
            compare_memory(options, Path(folder))
        else:
            compare_speed(options, Path(folder))


def write_rows(source: str, path: Path, rows: int, *, distinct: bool = False) -> list[list[dict[str, str]]]:
    """Write `rows` conversations without special-token text; return one of each.

    The source's are repeated; with `distinct` each of them has its number in front, and is no duplicate.
    """
    from peftchat.conversations import read_conversations

    conversations = [one.as_dicts() for one in read_conversations(source)]
    conversations = [one for one in conversations if not any("<|" in message["content"] for message in one)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            messages = conversations[number % len(conversations)]
            if distinct:
                messages = [{**messages[0], "content": f"{number}. {messages[0]['content']}"}, *messages[1:]]
            file.write(json.dumps({"messages": messages}) + "\n")
    return conversations


def recipe_for(path: Path, model: str, template: str = "starchat") -> Any:
    from peftchat.recipe import Recipe

    return Recipe.model_validate(
        {
            "model": {"name": model},
            "method": "lora",
            "adapter": {},
            "chat": {"template": template},
            "data": {"train": [{"path": str(path)}], "max_length": 1_000_000},
            "output_dir": "unused",
        }
    )


def compare_speed(options: argparse.Namespace, folder: Path) -> None:
    path = folder / "rows.jsonl"
    one_of_each = write_rows(options.conversations, path, options.rows)
    cores = len(os.sched_getaffinity(0))
    contenders = make_contenders(path, one_of_each, options, cores, folder)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    work: dict[str, list[float]] = {name: [] for name in names}
    tokens = 0
    for round_number in range(options.rounds + 1):
        results: dict[str, Encoded] = {}
        for name in names:
            # `Dataset.map` with processes leaves the variable at "false", and every tokenizer on one core from then on.
            os.putenv("TOKENIZERS_PARALLELISM", "true")
            started, worked = time.perf_counter(), processor_time()
            finish = contenders[name]()
            if round_number:  # the first round warms caches up
                seconds[name].append(time.perf_counter() - started)
                work[name].append(processor_time() - worked)
            else:
                results[name] = finish()
        if not round_number:
            check_equal(results)
            tokens = sum(map(len, results["tokenizer alone"].ids))
            # What lies around from here on belongs to the benchmark; the collector need not walk through it.
            gc.freeze()
    print(f"{options.rows:,} conversations, {tokens:,} tokens, {cores} cores, median of {options.rounds} rounds")
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

    from peftchat.chat_template.chat_format import make_format
    from peftchat.conversations import read_conversations
    from peftchat.dataset.cache import load_splits

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chat = make_format(options.template, None, tokenizer)
    recipe = recipe_for(path, options.model, options.template)
    # Most models' own templates have no marks; stock then makes ids only.
    marked = "generation %}" in str(tokenizer.chat_template)
    messages = [one_of_each[number % len(one_of_each)] for number in range(options.rows)]
    data = Dataset.from_dict({"messages": messages})
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    conversations = list(read_conversations(path))
    encoder = chat.encoder()
    counter = iter(range(10**6))

    def encode_some(batch: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=marked, return_attention_mask=False
        )
        return {"input_ids": made["input_ids"], "mask": made["assistant_masks"] if marked else made["input_ids"]}

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
            return lambda: Encoded(made["input_ids"][:], made["mask"][:] if marked else None)

        return run

    def prepared() -> Callable[[], Encoded]:
        os.environ["PEFTCHAT_CACHE"] = str(folder / f"cache-{next(counter)}")
        store = load_splits(recipe, chat)["train"].store
        return lambda: of_rows(store)

    def encoded() -> Callable[[], Encoded]:
        rows = []
        for start in range(0, len(conversations), 1024):
            rows.append(encoder.batch(conversations[start : start + 1024]))
        return lambda: of_rows([row for batch in rows for row in batch])

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
    from peftchat.chat_template.loss_mask import loss_mask_table

    table = loss_mask_table("answers")
    return Encoded([row.ids.tolist() for row in rows], [table[row.token_tags].astype(int).tolist() for row in rows])


def check_equal(results: dict[str, Encoded]) -> None:
    expected = results["datasets.map, row by row"]
    for name, result in results.items():
        same_mask = None in (result.mask, expected.mask) or result.mask == expected.mask
        if result.ids != expected.ids or not same_mask:
            raise SystemExit(f"{name} made other ids or another mask than datasets.map")


def compare_memory(options: argparse.Namespace, folder: Path) -> None:
    for rows in (options.rows * 3 // 100, options.rows * 3 // 10, options.rows):
        path = folder / f"rows-{rows}.jsonl"
        write_rows(options.conversations, path, rows, distinct=True)
        for step in options.steps:
            command = [sys.executable, __file__, options.conversations, "--model", options.model]
            command += ["--measure", str(path), "--step", step]
            environment = {**os.environ, "PEFTCHAT_CACHE": str(folder / "cache")}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            told = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{step:8} {told['rows']:9,} conversations of {path.stat().st_size / 2**20:5,.0f} MiB: "
                f"{told['seconds']:5.1f} s, processor {told['processor']:5.1f} s, "
                f"{told['rows'] / told['seconds']:7,.0f} rows/s, peak "
                f"{told['above'] / 2**20:4,.0f} MiB above the start, {told['anonymous'] / 2**20:4,.0f} MiB of it "
                "without the mapped file",
                flush=True,
            )
            shutil.rmtree(folder / "cache", ignore_errors=True)
        path.unlink()


def weigh(path: Path, model: str, step: str) -> dict[str, float]:
    """Run one step on a file: its rows, its time, and what it added to the resident memory at most, in bytes."""
    work = STEPS[step](path, model)
    gc.collect()
    peaks = [0, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peaks[:] = map(max, peaks, resident())

    before = resident()
    started, worked = time.perf_counter(), processor_time()
    watcher = threading.Thread(target=watch)
    watcher.start()
    rows = work()
    seconds, processor = time.perf_counter() - started, processor_time() - worked
    done.set()
    watcher.join()
    above = {"above": peaks[0] - before[0], "anonymous": peaks[1] - before[1]}
    return {"rows": rows, "seconds": seconds, "processor": processor, **above}


def resident() -> tuple[int, int]:
    """Resident bytes of this process, and those of them that belong to no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    total, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return total, anonymous


def clean(path: Path, model: str) -> Callable[[], int]:
    """`peftchat data prepare`: checks, duplicates, split, files."""
    from peftchat.conversations.prepare import PrepareOptions, prepare

    def run() -> int:
        with tempfile.TemporaryDirectory(prefix="prepared-") as folder:
            card = prepare(str(path), Path(folder), PrepareOptions())
        return card.train.conversations + card.eval.conversations

    return run


def load(path: Path, model: str) -> Callable[[], int]:
    """`datasets.load_dataset("json")`: the file in Arrow on disk, without a check of what it holds."""
    import datasets

    def run() -> int:
        with tempfile.TemporaryDirectory(prefix="loaded-") as folder:
            data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
            return len(data)

    return run


def stats(path: Path, model: str) -> Callable[[], int]:
    """`peftchat data stats` without a tokenizer: one pass with lengths, languages, code and duplicates."""
    from peftchat.conversations.stats import gather, parts_of_path

    return lambda: gather(parts_of_path(str(path))).parts[0].conversations


def parquet(path: Path, model: str) -> Callable[[], int]:
    """Reading the same conversations from a Parquet file of one row group."""
    from peftchat.conversations import read_conversations

    table = path.with_suffix(".parquet")
    # In a process of its own, whose memory is not that of the reader.
    writer = multiprocessing.Process(target=write_parquet, args=(path, table))
    writer.start()
    writer.join()
    return lambda: sum(1 for _ in read_conversations(table))


def write_parquet(path: Path, table: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    with path.open(encoding="utf-8") as file:
        parquet.write_table(pyarrow.Table.from_pylist(list(map(json.loads, file))), table, row_group_size=10**9)


def encode(path: Path, model: str) -> Callable[[], int]:
    """What `train` does with a file before the first step: rows on disk, and which of them share a sequence."""
    from transformers import AutoTokenizer

    from peftchat.chat_template.chat_format import make_format
    from peftchat.dataset.cache import load_splits
    from peftchat.dataset.packing import pack

    chat = make_format("starchat", None, AutoTokenizer.from_pretrained(model))

    def run() -> int:
        rows = load_splits(recipe_for(path, model), chat)["train"]
        return sum(map(len, pack(rows.store.lengths, max(2048, int(rows.store.lengths.max())), 0)))

    return run


STEPS: dict[str, Callable[[Path, str], Callable[[], int]]] = {
    "clean": clean,
    "encode": encode,
    "load": load,
    "stats": stats,
    "parquet": parquet,
}


if __name__ == "__main__":
    main()
