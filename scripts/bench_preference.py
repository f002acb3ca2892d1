"""Speed, memory and losses of DPO: peftchat against TRL's trainer on the same pairs in the same order.

    python scripts/bench_preference.py pairs.jsonl --model .cache/smollm2-135m
    python scripts/bench_preference.py pairs.jsonl --model FOLDER --rounds 3 --steps 20 --batch 4
    python scripts/bench_preference.py pairs.jsonl --model FOLDER --rounds 1 --runs runs.jsonl  # repeat to add rounds

Contenders run in turn, each in a process of its own, with the same batches, LoRA, learning rate and seed:

- `trl`: `DPOTrainer` with its defaults (gradient checkpointing, padding);
- `trl tuned`: without checkpointing;
- `peftchat`: the command `peftchat train`.

Pairs are encoded once by peftchat (`chatml` template, whose tokens the model must know), and TRL gets them as prompts
and completions. Speed counts the real tokens of both answers, each with its prompt, over all steps but the first, for
every contender alike: what is computed once for both counts twice. The reference's pass is in the time and not in the
tokens. Memory is the most that a process has held. The time of the CPU is told too, which other programs on the machine
change little. With `--runs FILE`, runs are appended to a file, and the table is of all runs in it: the contenders of a
round can then be measured by several calls.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

RATE = 1e-5
CONTENDERS = ("trl", "trl tuned", "peftchat")


@dataclass(frozen=True)
class Measured:
    """One contender's run.

    Attributes:
        tokens: real tokens of both answers behind the first step.
        seconds: the time of these steps.
        cpu_seconds: the time of the CPU in them.
        peak: bytes the process held at most.
        losses: the loss of each step.
    """

    tokens: int
    seconds: float
    cpu_seconds: float
    peak: int
    losses: list[float]


def main() -> None:
    """Run the contenders in turn and print a table."""
    arguments = parse()
    if arguments.one:
        print(json.dumps(asdict(train_with_trl(arguments.one, arguments))))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.rows = encode(arguments, Path(folder))
        found = read_runs(arguments.runs)
        for round_number in range(arguments.rounds):
            for name in arguments.contenders:
                print(f"round {round_number + 1}: {name}", file=sys.stderr, flush=True)
                if name == "peftchat":
                    run = with_peftchat(arguments, Path(folder), found["trl"][0].tokens)
                else:
                    run = with_trl(name, arguments)
                found[name].append(run)
                if arguments.runs:
                    with arguments.runs.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"contender": name, **asdict(run)}) + "\n")
    if all(found.values()):
        report(found)


def read_runs(path: Path | None) -> dict[str, list[Measured]]:
    """The runs of a file, by contender; none where there is no such file yet."""
    found: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    for line in lines:
        run = json.loads(line)
        found[run.pop("contender")].append(Measured(**run))
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=Path, help="append the runs to this file, and report all runs in it")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="trl comes first")
    parser.add_argument("--one", choices=CONTENDERS[:2], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe(arguments: argparse.Namespace, folder: Path) -> Path:
    """The recipe of our run, as a file."""
    text = {
        "model": {"name": str(Path(arguments.model).resolve()), "dtype": arguments.dtype},
        "method": "lora",
        "objective": "dpo",
        "adapter": {"r": 16, "alpha": 32},
        "chat": {"template": "chatml"},
        "data": {"train": [{"path": str(arguments.pairs.resolve())}], "max_length": arguments.max_length},
        "training": {
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_steps": arguments.steps,
            "per_device_train_batch_size": arguments.batch,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 0,
        },
        "distributed": {"strategy": "single"},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(text), encoding="utf-8")
    return path


def encode(arguments: argparse.Namespace, folder: Path) -> Path:
    """The pairs as peftchat trains on them: JSON lines with the ids of the prompt and of both completions."""
    command = [sys.executable, "-m", "peftchat", "mask", str(recipe(arguments, folder)), "--rows", "all", "--json"]
    rows = [json.loads(line) for line in finished(command).splitlines()]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
            row: dict[str, list[int]] = {}
            for one in (chosen, rejected):
                trained = [place for place, label in enumerate(one["labels"]) if label >= 0]
                row["prompt_ids"] = one["input_ids"][: trained[0]]
                row[f"{one['side']}_ids"] = one["input_ids"][trained[0] : trained[-1] + 1]
            file.write(json.dumps(row) + "\n")
    return path


def finished(command: list[str]) -> str:
    """What a command prints; its own message, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def report(found: dict[str, list[Measured]]) -> None:
    """Print the table."""
    print("| | real tokens/s | against trl | tokens by second of the CPU | against trl | peak GB |")
    print("|---|---:|---:|---:|---:|---:|")
    base, cpu_base = medians(found["trl"])
    for name, runs in found.items():
        speeds = sorted(run.tokens / run.seconds for run in runs)
        middle, cpu = medians(runs)
        peak = max(run.peak for run in runs) / 1e9
        wall = f"{middle:.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f}) | {middle / base:.2f}"
        print(f"| {name} | {wall} | {cpu:.0f} | {cpu / cpu_base:.2f} | {peak:.2f} |")
    for name, runs in found.items():
        pairs = zip(runs[0].losses, found["trl"][0].losses, strict=True)
        print(f"largest difference of {name}'s losses from trl's: {max(abs(a / b - 1) for a, b in pairs):.2%}")


def medians(runs: list[Measured]) -> tuple[float, float]:
    """Tokens by second, and by second of the CPU."""
    return (
        statistics.median(run.tokens / run.seconds for run in runs),
        statistics.median(run.tokens / run.cpu_seconds for run in runs),
    )


def with_peftchat(arguments: argparse.Namespace, folder: Path, tokens: int) -> Measured:
    """`peftchat train` as a user runs it, on the batches of TRL's trainer, which have so many tokens."""
    subprocess.run(["rm", "-rf", str(folder / "run")], check=True)
    metrics = folder / "run" / "metrics.jsonl"
    process = psutil.Popen(
        [sys.executable, "-m", "peftchat", "train", str(recipe(arguments, folder))],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    spent: dict[int, float] = {}
    while process.poll() is None:
        done = metrics.read_text().count("\n") if metrics.is_file() else 0
        if done in (1, arguments.steps) and done not in spent:
            times = process.cpu_times()
            spent[done] = times.user + times.system
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.stderr.read())
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run" / "run.json").read_text())
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    cpu_seconds = spent[arguments.steps] - spent[1]
    return Measured(tokens, seconds, cpu_seconds, summary["peak_memory_bytes"], [line["loss"] for line in lines])


def with_trl(name: str, arguments: argparse.Namespace) -> Measured:
    """Plain TRL in a process of its own."""
    command = [sys.executable, __file__, str(arguments.pairs), "--one", name, "--rows", str(arguments.rows)]
    for option in ("model", "steps", "batch", "max_length", "dtype"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    return Measured(**json.loads(finished(command).splitlines()[-1]))


def train_with_trl(name: str, arguments: argparse.Namespace) -> Measured:
    """Train with `DPOTrainer` and measure, in this process."""
    import resource

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    on_gpu = torch.cuda.is_available()
    stamps: list[tuple[float, float]] = []
    counts: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            stamps.append((time.time(), time.process_time()))

    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            bf16=arguments.dtype == "bfloat16",
            use_cpu=not on_gpu,
            optim="adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            max_length=arguments.max_length,
            gradient_checkpointing=name == "trl",
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)),
            args=config,
            # Its constructor encodes text; the encoded pairs take its place.
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train_dataset = Dataset.from_list(
            [json.loads(line) for line in arguments.rows.read_text().splitlines()]
        )
        collate = trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> Any:
            counts.append(
                sum(2 * len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
            )
            return collate(examples)

        trainer.data_collator = counted
        trainer.train()
    tokens = sum(counts[1 : arguments.steps])
    seconds, cpu_seconds = (last - first for first, last in zip(stamps[0], stamps[-1], strict=True))
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measured(
        tokens, seconds, cpu_seconds, peak, [line["loss"] for line in trainer.state.log_history if "loss" in line]
    )


if __name__ == "__main__":
    main()
