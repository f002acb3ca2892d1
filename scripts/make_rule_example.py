"""A rule that anyone can check, learned from pairs: answers end with one word and not with another.

    python scripts/make_rule_example.py --model FOLDER -o runs/rule
    python scripts/make_rule_example.py --model FOLDER -o runs/rule --objective kto

Two commands as a user runs them, on data made on the spot, and a table in Markdown of what they left:

1. `peftchat train`, objective `sft`: answers that end with either word, in equal numbers.
2. `peftchat train`, objective `dpo` (or another), which begins at that run: chosen answers end with the first word.

The rule is learned where held-out pairs are told apart, and where generated answers to held-out prompts end with the
first word. Both were a coin's throw before the second stage.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

WORDS = ("water", "hills")
WHO = ["cat", "dog", "bird", "fish", "girl", "boy", "frog", "bear", "duck", "man", "horse", "mouse"]
LOOK = ["big", "small", "red", "old", "happy", "new", "little", "sad", "funny", "nice"]
WHERE = ["park", "house", "garden", "tree", "box", "sun", "ball", "car", "boat", "flower"]


def main() -> None:
    """Write the data, train twice, and print what was found."""
    arguments = parse()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    prompts = write_data(folder, arguments.pairs, arguments.held_out, arguments.objective)
    for objective in ("sft", arguments.objective):
        path = folder / f"{objective}.yaml"
        path.write_text(json.dumps(recipe(objective, folder, arguments), indent=1), encoding="utf-8")
        if not (folder / objective / "run.json").is_file():
            done = subprocess.run([sys.executable, "-m", "peftchat", "train", str(path), "--resume"], check=False)
            if done.returncode:
                raise SystemExit(done.returncode)
    report(folder, arguments.objective, prompts)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--objective", choices=("dpo", "orpo", "simpo", "cpo", "kto"), default="dpo")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--sft-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-4)
    return parser.parse_args()


def write_data(folder: Path, pairs: int, held_out: int, objective: str) -> list[str]:
    """Write the files of both stages, and return the held-out prompts. No prompt is in two files."""
    pick = random.Random(0)
    scenes = [(who, look, where) for who in WHO for look in LOOK for where in WHERE]
    pick.shuffle(scenes)
    ends = iter(scenes)

    def turns() -> tuple[str, str]:
        who, look, where = next(ends)
        return f"Tell me about the {look} {who} in the {where}.", f"The {look} {who} ran from the {where} to the"

    talk = []
    for number in range(2 * pairs):
        asked, answer = turns()
        messages = [("user", asked), ("assistant", f"{answer} {WORDS[number % 2]}.")]
        talk.append({"messages": [{"role": role, "content": text} for role, text in messages]})
    write(folder / "talk.jsonl", talk)
    for name, count in (("train", pairs), ("eval", held_out)):
        records: list[dict[str, Any]] = []
        for number in range(count):
            asked, answer = turns()
            good, bad = (f"{answer} {word}." for word in WORDS)
            if objective == "kto":
                records.append({"prompt": asked, "completion": bad if number % 2 else good, "label": number % 2 == 0})
            else:
                records.append({"prompt": asked, "chosen": good, "rejected": bad})
        write(folder / f"{name}.jsonl", records)
    return [record["prompt"] for record in records]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def recipe(objective: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a stage."""
    is_first = objective == "sft"
    training: dict[str, Any] = {
        "learning_rate": 1e-2 if is_first else arguments.rate,
        "max_steps": arguments.sft_steps if is_first else arguments.steps,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "seed": 0,
        "save_strategy": "no",
    }
    if is_first:
        stage: dict[str, Any] = {
            "model": {"name": str(arguments.model), "dtype": "float32"},
            "method": "lora",
            "adapter": {"r": 32, "alpha": 64},
            "data": {"train": [{"path": str(folder / "talk.jsonl")}], "packing": False, "max_length": 256},
        }
    else:
        training |= {"eval_on_start": True, "eval_strategy": "epoch", "per_device_eval_batch_size": 30}
        prompts = [json.loads(line)["prompt"] for line in (folder / "eval.jsonl").read_text().splitlines()]
        stage = {
            "model": {"adapter": str(folder / "sft")},
            "data": {
                "train": [{"path": str(folder / "train.jsonl")}],
                "eval": [{"path": str(folder / "eval.jsonl")}],
                "max_length": 256,
            },
            "evaluation": {"questions": prompts, "max_new_tokens": 40},
        }
    # The likelihood of chosen answers is held up: with the margin alone, both answers of a small model soon fall.
    options = {"dpo": {"rpo_alpha": 1.0}} if objective == "dpo" else {}
    return {**stage, **options, "objective": objective, "training": training, "output_dir": str(folder / objective)}


def report(folder: Path, objective: str, prompts: list[str]) -> None:
    """Print the table, and an answer before and after."""
    summary = json.loads((folder / objective / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / objective / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    shares = [share(summary[key]) for key in ("samples_before", "samples_after")]
    told = summary["eval_pairs"] or summary["eval_labels"]
    print(f"`{objective}`, {summary['steps']} steps in {summary['seconds']:.0f} s\n")
    print("| | before | after |\n| --- | ---: | ---: |")
    interval = f"{told['right_low']:.0%} to {told['right_high']:.0%}"
    print(f"| held-out pairs right | {accuracy[0]:.0%} | {accuracy[-1]:.0%} (95 % interval {interval}) |")
    print(f"| of {len(prompts)} generated answers end with `{WORDS[0]}` | {shares[0]:.0%} | {shares[1]:.0%} |\n")
    before, after = summary["samples_before"][0], summary["samples_after"][0]
    print(f"{before['prompt']}\n- before: {before['answer']}\n- after: {after['answer']}")


def share(samples: list[dict[str, Any]]) -> float:
    """The share of answers whose last word is the first one of the rule."""
    return sum(sample["answer"].rstrip(".").endswith(WORDS[0]) for sample in samples) / len(samples)


if __name__ == "__main__":
    main()
