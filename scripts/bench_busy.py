"""Training beside other work on the same cores: how OpenMP's threads wait.

    python scripts/bench_busy.py CONVERSATIONS --base .cache/smollm2-135m --write docs/benchmarks.md

Runs of the same recipe take turns: threads that wait as GNU OpenMP has it by itself, and as peftchat sets them. Each is
measured on idle cores and beside processes that compute all the time. Speed is the median of the steps without the
first; CPU seconds are those of the whole run.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from page_tables import write_table

# OpenMP's own count of rounds, as long as no more threads are asked for than there are cores.
WAYS: Mapping[str, Mapping[str, str]] = {"GNU OpenMP": {"GOMP_SPINCOUNT": "300000"}, "peftchat": {}}
"""Variables of the environment of each way."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    Attributes:
        speed: tokens per second.
        cpu: user and system seconds of the run.
    """

    speed: float
    cpu: float


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Have so many processes compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def recipe_of(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the recipe as plain values."""
    return {
        "model": {"name": str(args.base.absolute()), "dtype": "float32"},
        "method": "lora",
        "chat": {"template": "chatml"},
        "data": {"train": [{"path": str(args.conversations.absolute())}], "max_length": args.length},
        "training": {
            "max_steps": args.steps, "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1,
            "logging_steps": 1, "save_strategy": "no", "torch_compile": False, "autotune": False,
        },
        "output_dir": str(folder),
    }  # fmt: skip


def measure(recipe: Path, folder: Path, way: Mapping[str, str], threads: int) -> Result:
    """Train in a child process."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_NUM_THREADS": str(threads), **way}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "peftchat", "train", str(recipe), "--set", f"output_dir={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Result(statistics.median(speeds[1:]), cpu)


def table(results: Mapping[tuple[int, str], Sequence[Result]], args: argparse.Namespace) -> str:
    """Return the results as a Markdown table, with the spread over rounds."""
    lines = ["| other processes | waiting | tokens/s | CPU seconds |", "|---:|---|---:|---:|"]
    for (others, way), rounds in results.items():
        speeds, seconds = sorted(one.speed for one in rounds), sorted(one.cpu for one in rounds)
        lines.append(
            f"| {others} | {way} | {statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f}) | "
            f"{statistics.median(seconds):,.0f} |"
        )
    return (
        f"\n{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {args.threads} threads on {os.cpu_count()} cores. "
        f"{args.base.name}, LoRA in float32, {args.steps} steps of {args.batch} x {args.length} tokens, "
        f"{args.rounds} rounds.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    """Measure every way with every number of other processes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2-135m"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--others", type=int, nargs="*", default=[0, 2], help="numbers of other processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="write the table into this page")
    args = parser.parse_args()
    results: dict[tuple[int, str], list[Result]] = {(others, way): [] for others in args.others for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary) / "recipe.json"
        recipe.write_text(json.dumps(recipe_of(args, Path(temporary) / "run")), encoding="utf-8")
        for number in range(args.rounds):
            for others, way in results:
                with busy_cores(others):
                    found = measure(recipe, Path(temporary) / f"{number}-{others}-{way}", WAYS[way], args.threads)
                results[others, way].append(found)
                print(f"round {number + 1}, {others} others, {way}: {found}", file=sys.stderr, flush=True)
    text = table(results, args)
    print(text)
    if args.write is not None:
        write_table(args.write, "bench_busy", text)


if __name__ == "__main__":
    main()
