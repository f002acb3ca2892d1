"""Memory and losses of full fine-tuning: float32 with AdamW beside weights in bfloat16 with small optimizer states.

    python scripts/bench_full_memory.py --base .cache/smollm2-135m CONVERSATIONS --write docs/benchmarks.md

Each way trains the same conversations in the same order, in a process of its own. Peak memory is the highest resident
size of the process (`run.json`); beside it stands what `peftchat plan` predicts.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from page_tables import write_table

from peftchat.planning.hardware import find_hardware
from peftchat.planning.plan import plan_training
from peftchat.recipe import load_recipe

LITTLE = {"master_weights": "bfloat16", "optimizer_in_backward": True}

WAYS: Mapping[str, Mapping[str, Any]] = {
    "float32, `adamw_torch_fused`": {"max_grad_norm": 0},
    "float32, `adamw_8bit`": {"max_grad_norm": 0, "optim": "adamw_8bit"},
    "float32, gradients freed": {"optimizer_in_backward": True},
    "bfloat16, `adamw_8bit`, gradients freed": {**LITTLE, "optim": "adamw_8bit"},
    "bfloat16, `adafactor`, gradients freed": {**LITTLE, "optim": "adafactor"},
    "bfloat16, `adafactor`, gradients freed, checkpointing": {
        **LITTLE, "optim": "adafactor", "gradient_checkpointing": True,
    },
}  # fmt: skip
"""What is written beside the settings that all have; the first is the reference."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    Attributes:
        peak: highest resident bytes.
        predicted: the same by `peftchat plan`.
        losses: of each step.
        seconds: of a step, the median without the first.
    """

    peak: int
    predicted: int
    losses: Sequence[float]
    seconds: float


def recipe_of(way: Mapping[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the recipe of a way as plain values."""
    training = {
        "learning_rate": args.rate, "max_steps": args.steps, "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "torch_compile": False, "autotune": False, "optim": "adamw_torch_fused",
    }  # fmt: skip
    return {
        "model": {"name": str(args.base.absolute()), "dtype": "bfloat16", "compute_dtype": args.compute_dtype},
        "method": "full",
        "data": {"train": [{"path": str(args.conversations.absolute())}], "max_length": args.length},
        "training": {**training, **way},
        "distributed": {"strategy": "single"},
        "output_dir": str(folder / "run"),
    }


def measure(recipe: Path, folder: Path) -> Result:
    """Train in a child process, and predict."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "peftchat", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    summary = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    shutil.rmtree(folder / "run")
    times = [line["seconds"] for line in lines]
    steps = [later - before for before, later in pairwise(times)]
    plan = plan_training(load_recipe(recipe, to_train=False).recipe, find_hardware("cpu", 1), with_grid=False)
    return Result(
        summary["peak_memory_bytes"], plan.memory.total, [line["loss"] for line in lines], statistics.median(steps)
    )


def table(results: Mapping[str, Result], args: argparse.Namespace) -> str:
    """Return the results as a Markdown table."""
    reference = next(iter(results.values()))
    marks = sorted({0, args.steps // 2, args.steps - 1})
    heads = [f"loss at step {mark + 1}" for mark in marks]
    rows = [
        [
            "weights and optimizer", "peak MB", "of the first", "planned MB", "error", "s a step", *heads,
            "largest difference",
        ],
        ["---", *["---:"] * (6 + len(marks))],
    ]  # fmt: skip
    for name, one in results.items():
        apart = max(abs(a / b - 1) for a, b in zip(one.losses, reference.losses, strict=True))
        rows.append([
            name, f"{one.peak / 1e6:,.0f}", f"{one.peak / reference.peak:.2f} x", f"{one.predicted / 1e6:,.0f}",
            f"{100 * (one.predicted / one.peak - 1):+.0f} %", f"{one.seconds:.1f}",
            *(f"{one.losses[mark]:.3f}" for mark in marks), "" if one is reference else f"{100 * apart:.1f} %",
        ])  # fmt: skip
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} "
        f"threads. {args.steps} steps of {args.batch} x {args.length} tokens at a rate of {args.rate:g}; all ways "
        f"compute in {args.compute_dtype}.\n\n{lines}"
    )


def main() -> None:
    """Measure every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2-135m"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of ways, from 0")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="write the table into this page")
    args = parser.parse_args()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, (name, way) in enumerate(WAYS.items()):
            if args.only is not None and number not in args.only:
                continue
            recipe = folder / "recipe.json"
            recipe.write_text(json.dumps(recipe_of(way, args, folder)), encoding="utf-8")
            results[name] = measure(recipe, folder)
            one = results[name]
            print(name, f"{one.peak / 1e6:,.0f} MB, planned {one.predicted / 1e6:,.0f}, {one.seconds:.1f} s a step",
                  [round(loss, 3) for loss in one.losses], flush=True)  # fmt: skip
    shown = table(results, args)
    print(shown)
    if args.write is not None:
        write_table(args.write, "bench_full_memory", f"\n{shown}\n")


if __name__ == "__main__":
    main()
