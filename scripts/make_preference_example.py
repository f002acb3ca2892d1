"""A second stage on real data: fine-tuning, then DPO on pairs of OpenAssistant's ranks, and its held-out pairs.

    python scripts/make_preference_example.py oasst_trees.jsonl.gz --model .cache/smollm2-135m -o runs/example
    python scripts/make_preference_example.py oasst_trees.jsonl.gz --model FOLDER -o FOLDER --steps 200

Three commands as a user runs them, and a table in Markdown of what they left in `run.json`:

1. `peftchat data prepare --pairs`: the best reply against the worst, split by tree. Pairs that are longer than
   `--characters` are left out.
2. `peftchat train`, objective `sft`: the chosen answers of the training pairs.
3. `peftchat train`, objective `dpo`, which begins at that run: the same pairs. Its reference is the first stage.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

QUESTIONS = ["How can I learn to cook?", "What is a good name for a cat?"]


def main() -> None:
    """Prepare, train twice, and print what was found."""
    arguments = parse()
    folder: Path = arguments.output
    peftchat(
        "data", "prepare", arguments.trees, "-o", folder / "data", "--pairs", "--languages", arguments.language,
        "--eval-fraction", arguments.eval_fraction,
    )  # fmt: skip
    counts = {side: keep_short(folder / "data" / f"{side}.jsonl", arguments.characters) for side in ("train", "eval")}
    stages = {}
    for objective in ("sft", "dpo"):
        path = folder / f"{objective}.yaml"
        path.write_text(json.dumps(recipe(objective, folder, arguments), indent=1), encoding="utf-8")
        if not (folder / objective / "run.json").is_file():
            peftchat("train", path, "--resume")
        stages[objective] = json.loads((folder / objective / "run.json").read_text(encoding="utf-8"))
    report(stages["sft"], stages["dpo"], counts)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, help="OpenAssistant's trees or messages")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--language", default="en")
    parser.add_argument("--characters", type=int, default=1000, help="most characters of a conversation")
    parser.add_argument("--eval-fraction", default="0.25")
    parser.add_argument("--held-out", type=int, default=1000, help="most held-out pairs")
    parser.add_argument("--steps", type=int, default=16, help="of each stage, with two conversations or pairs each")
    parser.add_argument("--sft-rate", type=float, default=2e-4)
    parser.add_argument("--dpo-rate", type=float, default=5e-5)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def peftchat(*arguments: object) -> None:
    """Run a command; it ends this program where it fails."""
    if arguments[0] == "data" and Path(str(arguments[4])).exists():
        return
    done = subprocess.run([sys.executable, "-m", "peftchat", *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def keep_short(path: Path, characters: int) -> int:
    """Leave out the pairs with a longer conversation, and return how many are left."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if longest(json.loads(line)) <= characters]
    path.write_text("".join(kept), encoding="utf-8")
    return len(kept)


def longest(record: dict[str, Any]) -> int:
    """The characters of the longer one of a pair's conversations."""
    return max(sum(len(turn["content"]) for turn in record[side]) for side in ("chosen", "rejected"))


def recipe(objective: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a stage. Base, adapter and template of the second one are those of the first."""
    is_first = objective == "sft"
    stage: dict[str, Any] = {"model": {"adapter": str(folder / "sft")}}
    if is_first:
        stage = {
            "model": {"name": str(arguments.model), "dtype": arguments.dtype},
            "method": "lora",
            "adapter": {"r": 16, "alpha": 32},
        }
    return {
        **stage,
        "objective": objective,
        "data": {
            "train": [{"path": str(folder / "data" / "train.jsonl")}],
            "eval": [{"path": str(folder / "data" / "eval.jsonl")}],
            "max_length": arguments.characters,
            "max_eval_samples": arguments.held_out,
            **({"packing": False} if is_first else {}),
        },
        "training": {
            "learning_rate": arguments.sft_rate if is_first else arguments.dpo_rate,
            "max_steps": arguments.steps,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "torch_compile": False,
            "logging_steps": 1,
            "eval_strategy": "no" if is_first else "epoch",
            "eval_on_start": not is_first,
            "save_strategy": "no" if is_first else "steps",
            **({} if is_first else {"save_steps": 4}),
        },
        **({} if is_first else {"evaluation": {"questions": QUESTIONS, "max_new_tokens": 48}}),
        "output_dir": str(folder / objective),
    }


def report(sft: dict[str, Any], dpo: dict[str, Any], counts: dict[str, int]) -> None:
    """Print the table and the samples."""
    pairs = dpo["eval_pairs"]
    print(f"{counts['train']} pairs to train on, {pairs['pairs']} held-out ones of other trees.\n")
    print("| | sft | dpo |\n| --- | ---: | ---: |")
    print(f"| steps of two | {sft['steps']} | {dpo['steps']} |")
    print(f"| tokens | {sft['tokens']:,} | {dpo['tokens']:,} |")
    print(f"| minutes | {sft['seconds'] / 60:.0f} | {dpo['seconds'] / 60:.0f} |")
    print(f"| held-out loss | | {dpo['eval_loss_before']:.4f} → {dpo['eval_loss']:.4f} |\n")
    print(json.dumps(pairs, indent=1))
    for before, after in zip(dpo["samples_before"], dpo["samples_after"], strict=True):
        print(f"\n{before['prompt']}\n- after sft: {before['answer']!r}\n- after dpo: {after['answer']!r}")


if __name__ == "__main__":
    main()
