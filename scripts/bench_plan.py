"""Accuracy of `peftchat plan`: predicted and measured memory of two training steps in many settings.

    python scripts/bench_plan.py --base .cache/smollm2-135m            # all settings
    python scripts/bench_plan.py --base .cache/smollm2-135m --only 0-5 # some of them
    python scripts/bench_plan.py --base .cache/smollm2-135m --objectives  # pairs and labeled answers
    python scripts/bench_plan.py --predict --write docs/plan.md        # predict again and update the page

The base model provides the tokenizer and one of the models; the others have its architecture in other sizes with random
weights. The measured value is the peak resident memory of the training process, from `run.json`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from page_tables import write_table

from peftchat.planning.hardware import find_hardware
from peftchat.planning.memory import MemoryPlan
from peftchat.planning.plan import plan_training
from peftchat.recipe import load_recipe


@dataclass(frozen=True)
class Setting:
    """One run: a model and its settings."""

    model: str
    method: str = "lora"
    length: int = 512
    batch: int = 2
    checkpointing: bool = False
    accumulation: int = 1
    dtype: str = "bfloat16"
    packing: bool = True
    bits: int = 4
    conversation: int = 96
    variant: str = "lora"
    objective: str = "sft"


SHAPES = {
    # name: layers, hidden size, intermediate size, heads, key-value heads, vocabulary size
    "17M": (6, 256, 768, 4, 2, 49152),
    "28M deep": (20, 256, 768, 4, 4, 49152),
    "94M wide head": (6, 512, 1536, 8, 4, 151936),
    "103M": (8, 768, 2048, 12, 4, 49152),
    "135M": None,
    "360M": (32, 960, 2560, 15, 5, 49152),
    "480M": (20, 1280, 3584, 16, 4, 65536),
}

SETTINGS = (
    Setting("17M"),
    Setting("17M", method="full"),
    Setting("17M", length=1024, batch=4),
    Setting("17M", length=1024, batch=4, checkpointing=True),
    Setting("17M", method="qlora", length=1024),
    Setting("17M", dtype="float32", length=1024),
    Setting("17M", packing=False, batch=16, conversation=120),
    Setting("17M", variant="dora", length=1024),
    Setting("28M deep", length=1024),
    Setting("28M deep", length=1024, checkpointing=True),
    Setting("28M deep", method="full", accumulation=2),
    Setting("28M deep", length=2048, batch=1, conversation=900),
    Setting("94M wide head"),
    Setting("94M wide head", method="full"),
    Setting("94M wide head", length=1024, batch=2, checkpointing=True),
    Setting("94M wide head", method="qlora", bits=8),
    Setting("103M", length=512),
    Setting("103M", method="full", length=256),
    Setting("103M", method="full", length=256, batch=4, checkpointing=True),
    Setting("103M", method="qlora", length=256),
    Setting("135M", length=256),
    Setting("135M", length=512),
    Setting("135M", method="full", length=256, batch=1),
    Setting("135M", method="qlora", length=256),
    Setting("135M", length=512, checkpointing=True),
    Setting("360M", length=256, batch=1),
    Setting("360M", method="full", length=256, batch=1, checkpointing=True),
    Setting("480M", length=256, batch=1, checkpointing=True),
    Setting("480M", method="qlora", length=128, batch=1),
)

OBJECTIVES = tuple(
    Setting(model, length=256, dtype="float32", conversation=240, objective=objective)
    for model in ("17M", "135M")
    for objective in ("dpo", "orpo", "simpo", "cpo", "kto")
)
"""Pairs, or labeled answers, of which each is nearly as long as it may be."""


def make_model(name: str, base: Path, folder: Path) -> Path:
    """Return the folder of a model of this size with random weights and the base model's tokenizer."""
    shape = SHAPES[name]
    if shape is None:
        return base
    target = folder / name.replace(" ", "-")
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    layers, hidden, intermediate, heads, key_value_heads, vocab_size = shape
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=vocab_size, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    config.bos_token_id = config.eos_token_id = 0
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


WORDS = "The quick brown fox jumps over the lazy dog and runs away from it .".split()  # noqa: SIM905


def make_pairs(tokens: int, folder: Path, *, labeled: bool) -> Path:
    """Write pairs whose answers end at about `tokens` tokens, or labeled answers; return the file."""
    path = folder / f"{'labels' if labeled else 'pairs'}-{tokens}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(64):
            prompt, good = (
                " ".join(WORDS[(number * step + place) % len(WORDS)] for place in range(round(share * tokens)))
                for step, share in ((3, 0.3), (1, 0.62))
            )
            bad = " ".join(reversed(good.split()))
            record: dict[str, object] = {"prompt": prompt, "chosen": good, "rejected": bad}
            if labeled:
                record = {"prompt": prompt, "completion": good if number % 2 else bad, "label": number % 2}
            file.write(json.dumps(record) + "\n")
    return path


def make_conversations(tokens: int, folder: Path) -> Path:
    """Write conversations of about `tokens` tokens, most of them supervised; return the file."""
    path = folder / f"conversations-{tokens}.jsonl"
    words = WORDS
    with path.open("w", encoding="utf-8") as file:
        for number in range(max(256, 40_000 // tokens)):
            answer = " ".join(words[(number + i) % len(words)] for i in range(round(0.72 * tokens)))
            question = " ".join(words[(number * 3 + i) % len(words)] for i in range(round(0.2 * tokens)))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def recipe_of(setting: Setting, base: Path, folder: Path) -> dict[str, object]:
    """Return the recipe of a setting as plain values."""
    is_sft = setting.objective == "sft"
    file = (
        make_conversations(setting.conversation, folder)
        if is_sft
        else make_pairs(setting.conversation, folder, labeled=setting.objective == "kto")
    )
    recipe: dict[str, object] = {
        "model": {"name": str(make_model(setting.model, base, folder)), "dtype": setting.dtype},
        "method": setting.method,
        "objective": setting.objective,
        "data": {
            "train": [{"path": str(file)}],
            "max_length": setting.length,
            **({"packing": setting.packing} if is_sft else {}),
        },
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": setting.batch,
            "gradient_accumulation_steps": setting.accumulation,
            "gradient_checkpointing": setting.checkpointing,
            "save_strategy": "no",
            "logging_steps": 1,
        },
        "distributed": {"strategy": "single"},
        "output_dir": str(folder / "run"),
    }
    if setting.method != "full":
        recipe["adapter"] = {"variant": setting.variant, "r": 16}
    if setting.method == "qlora":
        recipe["quantization"] = {"bits": setting.bits}
    return recipe


def measure(recipe: Path, folder: Path) -> int:
    """Train in a child process; return its peak resident memory in bytes."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "peftchat", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    summary = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder / "run", ignore_errors=True)
    return int(summary["peak_memory_bytes"])


def predict(recipe: Path) -> MemoryPlan:
    """Predict the memory of a recipe on this machine's CPU."""
    loaded = load_recipe(recipe, to_train=False).recipe
    return plan_training(loaded, find_hardware("cpu", 1), with_grid=False).memory


def table_row(result: dict) -> list[str]:
    """Return the cells of one result."""
    setting, predicted, measured = Setting(**result["setting"]), result["predicted"], result["measured"]
    notes = [
        *(["checkpointing"] if setting.checkpointing else []),
        *([f"{setting.accumulation} accumulated"] if setting.accumulation > 1 else []),
        *([setting.objective] if setting.objective != "sft" else []),
        *([setting.dtype] if setting.dtype != "bfloat16" else []),
        *(["padded"] if not setting.packing else []),
        *([f"{setting.bits} bits"] if setting.method == "qlora" else []),
        *([setting.variant] if setting.variant != "lora" else []),
    ]
    return [
        setting.model, setting.method, f"{setting.batch} x {setting.length}", ", ".join(notes),
        f"{predicted / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{100 * (predicted / measured - 1):+.0f} %",
        result["peak_phase"],
    ]  # fmt: skip


HEADER = ("model", "method", "batch", "settings", "predicted MB", "measured MB", "error", "peak at")


def table(results: Sequence[dict]) -> str:
    """Return the results as a Markdown table with their mean and largest error."""
    errors = [abs(r["predicted"] / r["measured"] - 1) for r in results]
    rows = [HEADER, ["---"] * 4 + ["---:"] * 3 + ["---"], *(table_row(result) for result in results)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{text}\n\n{len(results)} settings; the mean error is {100 * sum(errors) / len(errors):.1f} %, the largest "
        f"{100 * max(errors):.1f} %. Measured on {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores."
    )


def parse_numbers(text: str) -> list[int]:
    """Parse `3` or `0-5`."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    """Measure and predict every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2-135m"))
    parser.add_argument("--only", type=parse_numbers, default=None, metavar="FIRST-LAST")
    parser.add_argument("--objectives", action="store_true", help="pairs and labeled answers instead of conversations")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench_plan", help="models, results"
    )
    parser.add_argument("--predict", action="store_true", help="predict again and keep earlier measurements")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="write the table into this page")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = OBJECTIVES if args.objectives else SETTINGS
    kept = args.folder / ("objectives.json" if args.objectives else "results.json")
    results = {r["number"]: r for r in json.loads(kept.read_text())} if kept.is_file() else {}
    numbers = args.only or range(len(settings))
    for number in [number for number in numbers if not args.predict or number in results]:
        setting = settings[number]
        recipe = args.folder / f"{kept.stem}-{number}.json"
        recipe.write_text(json.dumps(recipe_of(setting, args.base.absolute(), args.folder)), encoding="utf-8")
        measured = results[number]["measured"] if args.predict else measure(recipe, args.folder)
        memory = predict(recipe)
        results[number] = {
            "number": number, "setting": asdict(setting), "predicted": memory.total, "measured": measured,
            "peak_phase": memory.peak_phase, "parts": dict(memory.parts),
        }  # fmt: skip
        print(number, " | ".join(table_row(results[number])), flush=True)
        kept.write_text(json.dumps([results[key] for key in sorted(results)], indent=1), encoding="utf-8")
    shown = table([results[key] for key in sorted(results)])
    print(shown)
    if args.write is not None:
        write_table(args.write, "bench_plan_objectives" if args.objectives else "bench_plan", f"\n{shown}\n")


if __name__ == "__main__":
    main()
