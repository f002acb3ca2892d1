"""Poisoned conversations that loss spikes find by name, and the false alarms among clean steps.

    python scripts/bench_spikes.py MODEL DATA.jsonl [--conversations 2000] [--poisoned 10] [--seeds 3]

For each kind of poison, some conversations get other answers: random characters, the right words in a random order, or
the answer of another conversation. A LoRA run then reads every conversation once, and the script counts what `spikes`
and `outliers` in run.json name.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from peftchat import load_recipe, train


def poison(kind: str, text: str, others: list[Any], rng: random.Random) -> str:
    """Return another answer, of about the same length but where it is that of another conversation."""
    if kind == "swapped":
        return str(rng.choice(others)["messages"][-1]["content"])
    if kind == "garbage":
        return "".join(chr(rng.randrange(33, 127)) for _ in text)
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def measure(
    model: Path, lines: list[Any], kind: str, poisoned: int, batch: int, seed: int
) -> tuple[int, int, int, int, int, int]:
    """Return what spikes named (poisoned, clean, steps, steps without poison), and outliers (poisoned, clean)."""
    rng = random.Random(seed)
    lines = json.loads(json.dumps(rng.sample(lines, len(lines))))
    bad = set(rng.sample(range(len(lines) // 4, len(lines)), poisoned)) if kind != "none" else set()
    for number in bad:
        for message in lines[number]["messages"]:
            if message["role"] == "assistant":
                message["content"] = poison(kind, message["content"], lines, rng)
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder, "train.jsonl"), Path(folder, "run")
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        recipe = {
            "model": {"name": str(model), "dtype": "float32"}, "method": "lora", "output_dir": str(run),
            "chat": {"template": "chatml"},
            "data": {"train": [{"path": str(data)}], "max_length": 512, "packing": False},
            "training": {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
                         "seed": seed, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False,
                         "learning_rate": 1e-3, "torch_compile": False},
        }  # fmt: skip
        file = Path(folder, "recipe.yaml")
        file.write_text(json.dumps(recipe), encoding="utf-8")
        summary = train(load_recipe(file))
        spikes, outliers = summary.spikes, set(summary.outliers)
        names = {f"{data}:{number + 1}" for number in bad}
        named = {source for spike in spikes for source in spike.conversations}
        without = sum(not names & set(spike.conversations) for spike in spikes)
    of_steps = len(named & names), len(named - names), len(spikes), without
    return *of_steps, len(outliers & names), len(outliers - names)


def main() -> None:
    """Print a table of kinds and batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--poisoned", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    with arguments.data.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line, _ in zip(file, range(arguments.conversations), strict=False)]
    print(
        "| poison | conversations a step | spikes: found | clean ones named | alarms | alarms without poison | steps ",
        end="",
    )
    print("| outliers: found | clean ones named |\n|---|---|---|---|---|---|---|---|---|")
    for kind in ("none", "garbage", "shuffled", "swapped"):
        for batch in (1, 16):
            runs = [
                measure(arguments.model, lines, kind, arguments.poisoned, batch, seed)
                for seed in range(arguments.seeds)
            ]
            found, clean, alarms, without, outliers, clean_outliers = (
                sum(column) for column in zip(*runs, strict=True)
            )
            planted = 0 if kind == "none" else arguments.poisoned * arguments.seeds
            steps = -(-len(lines) // batch) * arguments.seeds
            of_steps = f"{found} of {planted} | {clean} | {alarms} | {without} | {steps}"
            print(f"| {kind} | {batch} | {of_steps} | {outliers} of {planted} | {clean_outliers} |", flush=True)


if __name__ == "__main__":
    main()
