"""How near the advice of `train --find-lr` is to the best rate of whole runs, beside a range test.

    python scripts/bench_find_lr.py RECIPE [--rates 5] [--steps 20 40] [--set key=value]...

Whole runs at rates around the rule's are the truth. Each method then advises a rate; its regret is the held-out loss of
a whole run at that rate (a parabola through the whole runs) above the lowest. The range test is one run whose rate
rises by a factor of 100 around the rule; it advises a tenth of the rate after which the smoothed training loss is a
quarter above its lowest, as fastai's does, and the rate of its steepest fall.
"""

import argparse
import json
import math
import resource
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch.optim.lr_scheduler import LambdaLR

from peftchat import load_recipe
from peftchat.formatting import format_rate
from peftchat.recipe import LoadedRecipe
from peftchat.training.distributed import resolve_distributed
from peftchat.training.rate_rule import rule_rate
from peftchat.training.rate_search import ShortRuns, find_rate
from peftchat.training.rate_trials import GRID_STEP
from peftchat.training.trainer import ChatTrainer


@dataclass(frozen=True)
class Truth:
    """Held-out losses of whole runs."""

    rates: list[float]
    losses: list[float]

    def loss_at(self, rate: float) -> float:
        """Return the loss at a rate: on the parabola through the three nearest rates, over the logarithm."""
        logs = np.log(self.rates)
        nearest = sorted(np.argsort(np.abs(logs - math.log(rate)))[:3])
        found = float(np.polyval(np.polyfit(logs[nearest], np.array(self.losses)[nearest], 2), math.log(rate)))
        return found


def cpu_seconds() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def range_test(loaded: LoadedRecipe, folder: Path, steps: int, center: float) -> dict[str, float]:
    """Train one run whose rate rises from a tenth of `center` to ten times it; return what it advises."""
    runs = ShortRuns(loaded, resolve_distributed(loaded), folder, steps)
    make = ChatTrainer.create_scheduler

    def rising(trainer: ChatTrainer, num_training_steps: int, optimizer: object = None) -> LambdaLR:
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: 100 ** (step / (steps - 1)))
        return trainer.lr_scheduler

    ChatTrainer.create_scheduler = rising  # type: ignore[method-assign, assignment]
    try:
        losses = np.array(runs.train(center / 10).train_losses)
    finally:
        ChatTrainer.create_scheduler = make  # type: ignore[method-assign]
    smooth, value = [], 0.0
    for number, loss in enumerate(losses, 1):
        value = 0.9 * value + 0.1 * loss
        smooth.append(value / (1 - 0.9**number))
    rates = center / 10 * 100 ** (np.arange(len(losses)) / (steps - 1))
    lowest = int(np.argmin(smooth))
    slopes = np.gradient(np.array(smooth[: max(lowest, 2) + 1]))
    return {"range test: lowest / 10": rates[lowest] / 10, "range test: steepest": rates[int(np.argmin(slopes))]}


def main() -> None:
    """Print a table of methods, rates and regrets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rates", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 40])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    loaded = load_recipe(arguments.recipe, arguments.overrides)
    training = loaded.recipe.training.model_copy(update={"gradient_checkpointing": False})
    object.__setattr__(loaded, "recipe", loaded.recipe.model_copy(update={"training": training}))
    rule = rule_rate(loaded.recipe).value
    distributed = resolve_distributed(loaded)
    with tempfile.TemporaryDirectory() as folder:
        whole = ShortRuns(loaded, distributed, Path(folder, "probe"))
        whole.steps = whole.run_steps
        rates = [rule * GRID_STEP ** (place - arguments.rates // 2) for place in range(arguments.rates)]
        began = cpu_seconds()
        losses = [whole.train(rate).loss or math.inf for rate in rates]
        rows: list[tuple[str, float, float]] = [("whole runs", rates[int(np.argmin(losses))], cpu_seconds() - began)]
        truth = Truth(
            [r for r, x in zip(rates, losses, strict=True) if x < math.inf], [x for x in losses if x < math.inf]
        )
        print(json.dumps({"run_steps": whole.run_steps, "rates": rates, "losses": losses, "before": whole.loss_before}))
        rows.append(("the rule", rule, 0.0))
        for steps in arguments.steps:
            began = cpu_seconds()
            search = find_rate(loaded, distributed, steps=steps, tell=partial(print, flush=True))
            rows.append((f"--find-lr, {steps} steps a rate", search.advised, cpu_seconds() - began))
            rows.append((f"  interval of it: {format_rate(search.low)} to {format_rate(search.high)}", 0.0, 0.0))
        began = cpu_seconds()
        found = range_test(loaded, Path(folder, "range"), 100, rule)
        rows += [(name, rate, cpu_seconds() - began) for name, rate in found.items()]
    best = min(truth.losses)
    print("| method | rate | loss above the lowest of whole runs | CPU seconds |\n|---|---|---|---|")
    for name, rate, seconds in rows:
        regret = f"{truth.loss_at(rate) - best:+.4f}" if rate else ""
        print(f"| {name} | {format_rate(rate) if rate else ''} | {regret} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
