"""CPU seconds and wall seconds of whole commands: how long they take before they do anything, this version and another.

    python scripts/bench_start.py conversations.jsonl --before FOLDER --write docs/benchmarks.md

FOLDER is a checkout of another version. All commands run with one version, then with the other, in rounds, so that
other work slows both. A model answers one token, a run takes one step over one conversation of at most 128 tokens.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
from page_tables import write_table

HERE = Path(__file__).resolve().parent.parent


def recipe(args: argparse.Namespace, folder: Path) -> Path:
    """Write the recipe of a run of one step, and return its path."""
    first = args.conversations.read_text(encoding="utf-8").splitlines()[0]
    (folder / "train.jsonl").write_text(first + "\n", encoding="utf-8")
    values = {
        "model": {"name": str(args.model.resolve()), "dtype": "float32"},
        "method": "lora",
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "max_length": 128},
        "training": {
            "max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "learning_rate": 1e-3,
            "logging_steps": 1,
        },
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def measured(checkout: Path, folder: Path, *arguments: object) -> list[tuple[float, float]]:
    """Run a command of a checkout, and return its CPU seconds and wall seconds.

    For `train`, those until its first step is logged come second.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(folder / "cache")}
    log, found = folder / "run" / "metrics.jsonl", []
    before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with (folder / "errors.txt").open("w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "peftchat", *map(str, arguments)],
            env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        while arguments[0] == "train" and process.poll() is None and not found:
            time.sleep(0.01)
            if log.is_file() and '"loss"' in log.read_text(encoding="utf-8"):
                used = psutil.Process(process.pid).cpu_times()
                found.append((used.user + used.system, time.perf_counter() - since))
        status = process.wait()
        wall, after = time.perf_counter() - since, resource.getrusage(resource.RUSAGE_CHILDREN)
        errors.seek(0)
        if status:
            raise SystemExit(f"{arguments[0]} ended with status {status}: {errors.read()[-2000:].decode()}")
    return [(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall), *found]


def main() -> None:
    """Run every command with both versions in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of another version")
    parser.add_argument("--model", type=Path, default=Path(".cache/smollm2-135m"))
    parser.add_argument("--only", default="", metavar="TEXT", help="commands with this text in their name")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="write the table into this page")
    args = parser.parse_args()
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        training = ("train", recipe(args, folder))
        measured(HERE, folder, *training)
        shutil.copytree(folder / "run", folder / "kept")
        measured(HERE, folder, "merge", "kept", "--no-verify", "-o", "merged")
        (folder / "questions.jsonl").write_text('{"prompt": "Hi"}\n', encoding="utf-8")
        one = ("--greedy", "--max-new-tokens", 1)
        commands = {
            "`chat --prompt`, a full model": ("chat", "merged", "--prompt", "Hi", *one),
            "`chat --prompt`, a run": ("chat", "kept", "--prompt", "Hi", *one),
            "`generate`, one question": ("generate", "questions.jsonl", "--models", "merged", "-o", "answers", *one),
            "`merge --no-verify`": ("merge", "kept", "--no-verify", "-o", "again"),
            "`train`, one step, data not yet encoded": training,
            "`train`, the same again": training,
        }
        commands = {what: arguments for what, arguments in commands.items() if args.only in what}
        for _ in range(args.rounds):
            for version, checkout in (("before", args.before.resolve()), ("now", HERE)):
                for what, arguments in commands.items():
                    for made in ("run", "again", "answers"):
                        path = folder / made
                        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                    if "not yet" in what:
                        shutil.rmtree(folder / "cache", ignore_errors=True)
                    names = (what, f"{what}, until its first step is logged")
                    for name, figures in zip(names, measured(checkout, folder, *arguments), strict=False):
                        taken.setdefault(name, {}).setdefault(version, []).append(figures)
                        print(f"{version} {name}: {figures[0]:.1f} CPU s, {figures[1]:.1f} s", file=sys.stderr)
            # Each round is written, so that one that is cut short loses nothing.
            made_table = table(taken)
            if args.write is not None:
                write_table(args.write, "bench_start", f"\n{made_table}\n")
    print(made_table)


def table(taken: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Return the medians of the rounds so far as Markdown."""
    rounds = min(len(figures) for versions in taken.values() for figures in versions.values())
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, "
        f"rounds: {rounds}.",
        "",
        "| command | before: CPU seconds | now: CPU seconds | before: seconds | now: seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for what, versions in taken.items():
        cells = [shown([one[kind] for one in versions[version]]) for kind in (0, 1) for version in ("before", "now")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    """Return the median and the range of some seconds."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
