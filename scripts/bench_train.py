"""Training speed, memory and losses: peftchat against plain TRL on the same rows in the same order.

    python scripts/bench_train.py conversations.jsonl --model .cache/smollm2-135m
    python scripts/bench_train.py conversations.jsonl --model FOLDER --methods lora,full --rounds 3 --steps 20

Contenders run in turn, each in a process of its own, with the same batches (8 conversations), learning rate
and seed:

- `trl`: `SFTTrainer` with its defaults (gradient checkpointing, padding);
- `trl tuned`: without checkpointing, and without padding (`padding_free`);
- `peftchat`: the command `peftchat train`, without packing, so that every step sees the same conversations;
- `peftchat packed`: the same with packs of 1,024 tokens and about as many tokens a step; other steps, so no losses;
- `peftchat compiled`, `peftchat packed compiled`: with compiled layers, as a longer run would choose by itself.

Rows are encoded once by peftchat (`chatml` template, whose tokens the model must know) and handed to TRL with their
labels. Speed counts real tokens over all steps but the first; memory is the most that a process has held.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 8
PACK = 1024
RATE = 1e-4
CONTENDERS = ("trl", "trl tuned", "peftchat", "peftchat compiled", "peftchat packed", "peftchat packed compiled")


@dataclass(frozen=True)
class Measured:
    """One contender's run.

    Attributes:
        speed: real tokens a second behind the first step.
        supervised: supervised tokens a second.
        peak: bytes the process held at most.
        to_first_step: seconds from the start of the process to the end of the first step.
        losses: the loss of each step, in nats.
        utilization: share of the measured matrix peak; only peftchat tells it.
    """

    speed: float
    supervised: float
    peak: int
    to_first_step: float
    losses: list[float]
    utilization: float | None


def main() -> None:
    """Run the contenders in turn and print a table."""
    arguments = parse()
    if arguments.one:
        print(json.dumps(train_with_trl(arguments.one, arguments.method, arguments.rows, arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for source in arguments.conversations:
            rows = encode(source, arguments, Path(folder))
            for method in arguments.methods.split(","):
                compare(source, method, rows, arguments, Path(folder))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path, nargs="*")
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", default="lora,qlora,full")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--one", choices=["trl", "trl tuned"], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe(source: Path, method: str, arguments: argparse.Namespace, folder: Path, contender: str) -> Path:
    """The recipe of a run, as a file."""
    packed = "packed" in contender
    text = {
        "model": {"name": str(Path(arguments.model).resolve()), "dtype": arguments.dtype},
        "method": method,
        "chat": {"template": "chatml"},
        "data": {"train": [{"path": str(source.resolve())}], "max_length": arguments.max_length, "packing": packed},
        "training": {
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_steps": arguments.steps,
            "per_device_train_batch_size": max(1, PACK // arguments.max_length) if packed else arguments.batch,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "torch_compile": "compiled" in contender,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 0,
        },
        "distributed": {"strategy": "single"},
        "output_dir": str(folder / "run"),
    }
    if method != "full":
        text["adapter"] = {"variant": "lora", "r": 16, "alpha": 32, "dropout": 0.0}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(text), encoding="utf-8")
    return path


def encode(source: Path, arguments: argparse.Namespace, folder: Path) -> Path:
    """The rows of a source as peftchat trains on them: JSON lines with `input_ids` and `labels`."""
    made = recipe(source, "lora", arguments, folder, "peftchat")
    command = [sys.executable, "-m", "peftchat", "mask", str(made), "--rows", "all", "--json"]
    lines = finished(command).splitlines()
    path = folder / f"{source.stem}-rows.jsonl"
    kept = ({name: row[name] for name in ("input_ids", "labels")} for row in map(json.loads, lines))
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return path


def finished(command: list[str]) -> str:
    """What a command prints; its own message, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def compare(source: Path, method: str, rows: Path, arguments: argparse.Namespace, folder: Path) -> None:
    """Run every contender in alternation and print what they measured."""
    names = arguments.contenders.split(",")
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for round_number in range(arguments.rounds):
        for name in names:
            print(f"{source.name}, {method}, round {round_number + 1}: {name}", file=sys.stderr, flush=True)
            run = with_peftchat if name.startswith("peftchat") else with_trl
            found[name].append(run(name, source, method, rows, arguments, folder))
    print(f"\n{source.name}, {method}: median of {arguments.rounds} rounds (least to most)")
    print("| | real tokens/s | against trl | supervised tokens/s | peak GB | to first step | of matrix peak |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, runs in found.items():
        print(row_of(name, runs, found.get("trl")))
    for name, runs in found.items():
        if "packed" not in name and "trl" in found:
            pairs = zip(runs[0].losses, found["trl"][0].losses, strict=True)
            print(f"largest difference of {name}'s losses from trl's: {max(abs(a / b - 1) for a, b in pairs):.2%}")
    print(flush=True)


def row_of(name: str, runs: list[Measured], against: list[Measured] | None) -> str:
    """One line of the table."""
    speeds = sorted(run.speed for run in runs)
    ratio = "" if against is None else f"{statistics.median(speeds) / statistics.median(r.speed for r in against):.2f}"
    shares = [run.utilization for run in runs if run.utilization is not None]
    cells = [
        f"{statistics.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})",
        ratio,
        f"{statistics.median(run.supervised for run in runs):.0f}",
        f"{max(run.peak for run in runs) / 1e9:.2f}",
        f"{statistics.median(run.to_first_step for run in runs):.1f} s",
        f"{statistics.median(shares):.0%}" if shares else "",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def with_peftchat(
    name: str, source: Path, method: str, rows: Path, arguments: argparse.Namespace, folder: Path
) -> Measured:
    """`peftchat train` as a user runs it."""
    made = recipe(source, method, arguments, folder, name)
    subprocess.run(["rm", "-rf", str(folder / "run")], check=True)
    began = time.time()
    finished([sys.executable, "-m", "peftchat", "train", str(made)])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run" / "run.json").read_text())
    first, last = lines[0], [line for line in lines if "loss" in line][-1]
    tokens = summary["tokens"] - first["tokens_per_second"] * first["seconds"]
    speed = tokens / (last["seconds"] - first["seconds"])
    return Measured(
        speed=speed,
        supervised=speed * summary["supervised_tokens"] / summary["tokens"],
        peak=summary["peak_memory_bytes"],
        to_first_step=summary["seconds_to_first_step"] if "seconds_to_first_step" in summary else time.time() - began,
        losses=[line["loss"] for line in lines if "loss" in line],
        # That of the run counts the first step too, in which layers are compiled.
        utilization=summary["model_flops_utilisation"] * speed / summary["tokens_per_second"],
    )


def with_trl(name: str, source: Path, method: str, rows: Path, arguments: argparse.Namespace, folder: Path) -> Measured:
    """Plain TRL in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--method", method, "--rows", str(rows)]
    for option in ("model", "steps", "batch", "max_length", "dtype"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    return Measured(**json.loads(finished(command).splitlines()[-1]))


def train_with_trl(name: str, method: str, rows: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with `SFTTrainer` and measure, in this process."""
    began = time.time()
    import resource

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    data = Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])
    dtype = getattr(torch, arguments.dtype)
    options: dict[str, Any] = {"dtype": torch.float32 if method == "full" else dtype}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if on_gpu:
            options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
    stamps, counts = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            stamps.append(time.time())

    choices: dict[str, Any] = {"max_length": arguments.max_length}
    if name == "trl tuned":
        # Rows come cut to length; without padding TRL refuses to look.
        choices = {"gradient_checkpointing": False, "padding_free": True, "max_length": None}
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
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
            dataset_kwargs={"skip_prepare_dataset": True},
            **choices,
        )
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            peft_config=None if method == "full" else adapter,
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> Any:
            labels = [label for example in examples for label in example["labels"][1:]]
            counts.append((sum(len(e["input_ids"]) for e in examples), sum(label != -100 for label in labels)))
            return collate(examples)

        trainer.data_collator = counted
        trainer.train()
    seconds = stamps[-1] - stamps[0]
    measured = counts[1 : arguments.steps]
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "speed": sum(count for count, _ in measured) / seconds,
        "supervised": sum(count for _, count in measured) / seconds,
        "peak": peak,
        "to_first_step": stamps[0] - began,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "utilization": None,
    }


if __name__ == "__main__":
    main()
