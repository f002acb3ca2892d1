"""Train every variant on small random mixtures of experts, and write the table of docs/moe.md from what happened.

    python scripts/make_moe_docs.py [--only lora,dora] [--models qwen3_moe,mixtral]

A run that ends is merged, and the merged model must give the logits of stock PEFT's adapter. The whole table takes a
few minutes.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import peftchat
from peftchat.errors import UserError, VerificationError
from peftchat.files import write_text
from peftchat.library_setup import prepare_libraries
from peftchat.merging import MergeOptions
from peftchat.recipe import load_recipe
from peftchat.variants import ADAPTERS
from tests.support.models import small_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "moe.md"
MODELS = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3")
PACKING = {"gpt_oss": {"packing": False}}
"""GPT-OSS does not isolate packed conversations, so training refuses to pack them."""

MARK = "<!-- Written by scripts/make_moe_docs.py from here on. -->"
PAIRS = ("how are you", "i am well"), ("what is this", "it is a small model"), ("say a word", "tree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help="these variants, separated by commas; nothing is written")
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAMES", help="these models")
    chosen = parser.parse_args()
    prepare_libraries()
    models = chosen.models.split(",")
    ways = [("full", "")]
    ways += [("lora", name) for name in ADAPTERS]
    ways += [("qlora", name) for name in ("lora", "rslora", "loraplus")]
    if chosen.only:
        ways = [(method, name) for method, name in ways if (name or method) in chosen.only.split(",")]
    rows = []
    for method, variant in ways:
        results = {model: outcome(model, method, variant) for model in models}
        rows.append((method, variant, results))
        print(method, variant, json.dumps(results), flush=True)
    if not chosen.only and models == list(MODELS):
        head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
        write_text(PAGE, f"{head}{MARK}\n\n{table(rows)}")
        print(f"wrote {PAGE}")


def outcome(model: str, method: str, variant: str) -> str:
    """Train on one model; return `trained`, `trained, merged`, or the reason of the refusal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                peftchat.train(load_recipe(recipe(folder, model, method, variant)))
                if method == "full":
                    return "trained"
                return merged(folder / "run")
        except UserError as error:
            return f"refused: {error.message}"
        except VerificationError as error:
            return f"failed: {error}"
        except Exception as error:  # a row of the table, not a stack trace
            return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"


def merged(run: Path) -> str:
    """Merge a run, which compares the result with base and adapter; return what happened."""
    try:
        peftchat.merge(run, MergeOptions(output=run.parent / "merged"))
    except UserError as error:
        return f"trained; not merged: {error.message}"
    return "trained, merged"


def recipe(folder: Path, model: str, method: str, variant: str) -> Path:
    """Write a recipe of two steps, and its data."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]})
        for one, other in PAIRS * 4
    ]
    write_text(folder / "chat.jsonl", "\n".join(lines) + "\n")
    section: dict[str, Any] = {
        "model": {"name": str(small_model(model)), "dtype": "float32"},
        "method": method,
        "data": {"train": [{"path": str(folder / "chat.jsonl")}], "max_length": 64, **PACKING.get(model, {})},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
        "output_dir": str(folder / "run"),
    }
    if variant:
        section["adapter"] = {"variant": variant, **({"r": 2} if variant in ("lora", "rslora", "loraplus") else {})}
    write_text(folder / "recipe.yaml", json.dumps(section))
    return folder / "recipe.yaml"


def table(rows: list[tuple[str, str, dict[str, str]]]) -> str:
    """Return the table, with models of the same outcome in one row."""
    lines = ["| method | variant | models | outcome |", "| --- | --- | --- | --- |"]
    for method, variant, results in rows:
        models_of: dict[str, list[str]] = {}
        for model, result in results.items():
            models_of.setdefault(result.replace(f"`{model}`", "model"), []).append(model)
        for result, models in models_of.items():
            names = "all" if len(models) == len(results) else ", ".join(models)
            lines.append(f"| {method} | {f'`{variant}`' if variant else ''} | {names} | {result} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
