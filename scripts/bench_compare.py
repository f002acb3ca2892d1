"""How much sooner `peftchat compare` ends with forked processes and short runs, and whether it picks the same.

    python scripts/bench_compare.py MODEL TRAIN.jsonl EVAL.jsonl [--steps 40] [--repeat 1]

The same variants are compared at the same learning rates twice, in alternation: *before*, with a full run at every rate
in a new process, and *after*, as `compare` does now. CPU seconds count all processes. They
depend less on what else the machine does than the time on the clock, which is printed as well.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peftchat

VARIANTS = ("lora", "rslora", "dora", "loraplus", "pissa", "miss", "ia3", "full")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Measured:
    """A comparison.

    Attributes:
        cpu, clock: seconds.
        recommended, tied: names of variants.
        rates: the rate that was taken for each variant.
        losses: the loss of each variant at its rate.
    """

    cpu: float
    clock: float
    recommended: str
    tied: tuple[str, ...]
    rates: dict[str, float]
    losses: dict[str, float]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(recipe: Path, out: Path, variants: Sequence[str], *, after: bool) -> Measured:
    """Run one comparison."""
    cpu, clock = cpu_seconds(), time.perf_counter()
    result = peftchat.compare(
        recipe, variants, output=out, seeds=1, learning_rates=list(RATES), halving=after, fork=after, merge=False,
        num_samples=0,
    )  # fmt: skip
    advice = result.recommendation
    assert advice is not None
    return Measured(
        cpu_seconds() - cpu,
        time.perf_counter() - clock,
        advice.recommended.candidate.name,
        tuple(one.candidate.name for one in advice.tied),
        {one.candidate.name: float(one.settings["training.learning_rate"]) for one in result.candidates},
        {one.candidate.name: one.loss.mean for one in result.candidates if one.loss is not None},
    )


def main() -> None:
    """Print times and picks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("eval")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    options: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(
            f"model: {{name: {options.model}, dtype: float32}}\nmethod: lora\nchat: {{template: chatml}}\n"
            f"data: {{train: [{{path: {options.train}}}], eval: [{{path: {options.eval}}}], max_length: 512}}\n"
            f"training: {{max_steps: {options.steps}, per_device_train_batch_size: 1, "
            f"gradient_accumulation_steps: 1}}\noutput_dir: {folder}/run\n",
            encoding="utf-8",
        )
        for number in range(options.repeat):
            before, after = (
                measure(recipe, Path(folder, f"{number}-{after}"), options.variants.split(","), after=after)
                for after in (False, True)
            )
            print(f"CPU seconds {before.cpu:.0f} -> {after.cpu:.0f}: {before.cpu / after.cpu:.2f} times fewer")
            print(f"clock       {before.clock:.0f} -> {after.clock:.0f}: {before.clock / after.clock:.2f} times sooner")
            print(f"recommended {before.recommended} -> {after.recommended}")
            print(f"tied        {', '.join(before.tied)} -> {', '.join(after.tied)}")
            for name, rate in before.rates.items():
                other = after.rates.get(name)
                print(f"  {name:10} {rate:g} ({before.losses[name]:.4f}) -> {other:g} ({after.losses[name]:.4f})")


if __name__ == "__main__":
    main()
