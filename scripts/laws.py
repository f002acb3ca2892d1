"""Published laws of fine-tuning, run again on a small model.

    python scripts/laws.py MODEL TRAIN.jsonl EVAL.jsonl --results laws.jsonl [--steps 40] [--seeds 2]
    python scripts/make_laws_docs.py laws.jsonl [OTHER.jsonl]

Every run is one of `train --find-lr`: the same weights, data and schedule. Each line of the results is one run, so the
script goes on where it was interrupted. The second script judges the results of one model or several, and writes
docs/laws.md with one plot a law. docs/laws.md has the commands that made its tables.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from laws_results import UNTRAINED, Results

from peftchat import load_recipe
from peftchat.comparing.compare import GENERAL_TEXT
from peftchat.comparing.evaluate import general_losses
from peftchat.training.distributed import resolve_distributed
from peftchat.training.rate_search import ShortRuns
from peftchat.training.rate_trials import GRID_STEP
from peftchat.training.trainer import ChatTrainer

_MAX_MORE = 3
"""Rates beyond a setting's own that are tried at most."""


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: in tables and plots.
        sections: of the recipe.
        center: rate in the middle of its grid.
        rates: their number.
        batch: conversations of a step, as a multiple of the usual one; steps are divided by it.
    """

    name: str
    sections: dict[str, Any]
    center: float
    rates: int = 5
    batch: int = 1

    def grid(self) -> list[float]:
        """Return its rates."""
        return [float(f"{self.center * GRID_STEP ** (place - self.rates // 2):.2e}") for place in range(self.rates)]


def lora(name: str, center: float, rates: int = 5, batch: int = 1, method: str = "lora", **adapter: Any) -> Setting:
    """Return a setting of an adapter."""
    return Setting(name, {"method": method, "adapter": {"alpha": 32, **adapter}}, center, rates, batch)


def settings(center: float, attention_rank: int, rates: int = 5) -> dict[str, Setting]:
    """Return the settings by name; `center` is about LoRA's best rate, and `rates` the most of a grid."""
    full, few = {"method": "full"}, min(3, rates)
    found = [
        lora("LoRA r16", center, rates, r=16),
        Setting("full", full, center / 10, rates),
        lora("LoRA r2", center, rates, r=2),
        lora("LoRA r64", center, rates, r=64),
        lora("attention alone", center, few, r=attention_rank, target_modules="attention"),
        lora("all layers", center, few, r=4),
        lora("LoRA r16, batch x 8", center, few, 8, r=16),
        Setting("full, batch x 8", full, center / 10, few, 8),
        lora("DoRA", center, few, variant="dora", r=16),
        lora("PiSSA", center / 2, few, variant="pissa", r=16),
        lora("rsLoRA", center / 4, few, variant="rslora", r=16),
        lora("QLoRA (NF4)", center, few, method="qlora", r=16),
    ]
    return {one.name: one for one in found}


def measure_untrained(arguments: argparse.Namespace, results: Results) -> None:
    """Measure the base's loss on general text, if that is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (UNTRAINED, 0.0, 0) in results.rows:
        return
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    general = general_losses(model, tokenizer, GENERAL_TEXT.read_text(encoding="utf-8"))
    results.add({"setting": UNTRAINED, "rate": 0.0, "seed": 0, "general": general})


def run(arguments: argparse.Namespace, results: Results, plan: Iterable[Setting]) -> None:
    """Train what is missing; go on beyond the end of the rates where the lowest loss is, as `train --find-lr` does."""
    for setting in plan:
        rates = sorted({rate for name, rate, _ in results.rows if name == setting.name} | set(setting.grid()))
        while True:
            for seed in range(arguments.seeds):
                missing = [rate for rate in rates if (setting.name, rate, seed) not in results.rows]
                if missing:
                    train(arguments, results, setting, seed, missing)
            found = results.of(setting.name, range(arguments.seeds))
            if found is None or not found.at_edge or len(rates) >= setting.rates + _MAX_MORE:
                break
            is_first = int(np.argmin(found.curve())) == 0
            further = found.rates[0] / GRID_STEP if is_first else found.rates[-1] * GRID_STEP
            if float(f"{further:.2e}") in rates:
                break  # It failed.
            rates = sorted([*rates, float(f"{further:.2e}")])


def train(arguments: argparse.Namespace, results: Results, setting: Setting, seed: int, rates: list[float]) -> None:
    """Train a setting at some rates."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    steps = max(1, arguments.steps // setting.batch)
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": {"name": str(arguments.model), "dtype": arguments.dtype}, **setting.sections,
            "chat": {"template": arguments.template}, "output_dir": str(Path(folder, "run")),
            "data": {"train": [{"path": str(arguments.train)}], "eval": [{"path": str(arguments.eval)}],
                     "max_length": arguments.max_length, "max_eval_samples": arguments.max_eval_samples},
            "training": {"seed": seed, "max_steps": steps, "per_device_train_batch_size": 2,
                         "gradient_accumulation_steps": setting.batch, "gradient_checkpointing": False,
                         "torch_compile": False},
        }  # fmt: skip
        file = Path(folder, "recipe.yaml")
        file.write_text(json.dumps(recipe), encoding="utf-8")
        loaded = load_recipe(file)
        runs = ShortRuns(loaded, resolve_distributed(loaded), Path(folder, "run"), steps)
        text = GENERAL_TEXT.read_text(encoding="utf-8")
        seen: dict[str, Any] = {}

        def look(trainer: ChatTrainer) -> None:
            seen["supervised"] = trainer.throughput.collect().supervised
            seen["trained"] = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
            seen["general"] = general_losses(trainer.model.eval(), tokenizer, text)

        for rate in rates:
            seen.clear()
            trial = runs.train(rate, look)
            row = {"setting": setting.name, "rate": rate, "seed": seed, "problem": trial.problem,
                   "losses": [one.loss for one in trial.held_out], "tokens": [one.weight for one in trial.held_out],
                   "before": runs.loss_before, **seen}  # fmt: skip
            results.add(row)
            print(f"{setting.name}, seed {seed}: {trial}", flush=True)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", type=int, default=5, help="of a grid at most; more follow at its ends")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-eval-samples", type=int)
    parser.add_argument("--template", default="starchat")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--center", type=float, default=3.4e-3, help="about LoRA's best rate (train --find-lr)")
    parser.add_argument(
        "--attention-rank", type=int, default=11, help="rank that has as many parameters as 4 on all layers"
    )
    parser.add_argument("--data", default="", help="what the data is, for the page")
    parser.add_argument("--settings", nargs="+", help="train these alone, by name")
    arguments = parser.parse_args()
    about = {"model": arguments.model.resolve().name, "data": arguments.data, "steps": arguments.steps,
             "max_length": arguments.max_length, "max_eval_samples": arguments.max_eval_samples,
             "template": arguments.template, "dtype": arguments.dtype}  # fmt: skip
    results = Results.read(arguments.results, about)
    measure_untrained(arguments, results)
    plan = settings(arguments.center, arguments.attention_rank, arguments.rates)
    if unknown := set(arguments.settings or ()) - set(plan):
        parser.error(f"unknown settings {', '.join(sorted(unknown))}; known are {', '.join(plan)}")
    run(arguments, results, [plan[name] for name in arguments.settings or plan])


if __name__ == "__main__":
    main()
