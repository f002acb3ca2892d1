"""Published laws of fine-tuning, run again on a small model: docs/laws.md with one plot a law.

    python scripts/laws.py MODEL TRAIN.jsonl EVAL.jsonl --results laws.jsonl [--steps 40] [--seeds 2] [--write docs]

Every run is one of `train --find-lr`: the same weights, data and schedule. Each line of the results is one run, so the
script goes on where it was interrupted. Losses are held-out, in nats per supervised token. Differences are those at
each side's best rate, paired by conversation; intervals are two standard errors over conversations and seeds. Intervals
of best rates come from drawing conversations and seeds anew.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftchat import load_recipe
from peftchat.reports.svg import Series, line_plot
from peftchat.training.distributed import resolve_distributed
from peftchat.training.rate_search import ShortRuns
from peftchat.training.rate_trials import GRID_STEP

_STYLE = (
    "<style>text{font:11px sans-serif;fill:#444}.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}"
    "line{stroke-width:2}.grid{stroke-width:1}.hidden{opacity:0}"
    + "".join(
        f".line-{n}{{stroke:{c}}}circle.line-{n}{{fill:{c}}}"
        for n, c in enumerate(("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed"))
    )
    + "</style>"
)

_MAX_MORE = 3
"""Rates beyond a setting's own that are tried at most."""

_TIE = 0.005
"""Relative difference below which two losses count as equal, as in `compare`."""


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


def settings(center: float, attention_rank: int) -> dict[str, Setting]:
    """Return the settings by name; `center` is about LoRA's best rate."""
    full = {"method": "full"}
    found = [
        Setting("full", full, center / 10),
        lora("LoRA r16", center, r=16),
        lora("LoRA r2", center, r=2),
        lora("LoRA r64", center, r=64),
        lora("attention alone", center, 3, r=attention_rank, target_modules="attention"),
        lora("all layers", center, 3, r=4),
        lora("LoRA r16, batch x 8", center, 3, 8, r=16),
        Setting("full, batch x 8", full, center / 10, 3, 8),
        lora("DoRA", center, 3, variant="dora", r=16),
        lora("PiSSA", center / 2, 3, variant="pissa", r=16),
        lora("rsLoRA", center / 4, 3, variant="rslora", r=16),
        lora("QLoRA (NF4)", center, 3, method="qlora", r=16),
    ]
    return {one.name: one for one in found}


@dataclass
class Results:
    """Losses of each conversation for each setting, rate and seed, kept as JSON lines."""

    path: Path
    rows: dict[tuple[str, float, int], dict[str, Any]] = field(default_factory=dict)

    def read(self) -> None:
        """Read what is there."""
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[row["setting"], row["rate"], row["seed"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Keep a run."""
        self.rows[row["setting"], row["rate"], row["seed"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, name: str) -> "Measured | None":
        """Return the losses of a setting at the rates that every seed has finished; None if there are none."""
        rows = [row for (setting, _, _), row in self.rows.items() if setting == name]
        # Every setting has the same seeds, so that differences are paired by seed too.
        seeds = sorted({seed for _, _, seed in self.rows})
        rates = sorted({row["rate"] for row in rows})
        kept = [rate for rate in rates if all(self.rows.get((name, rate, seed), {}).get("losses") for seed in seeds)]
        if not kept:
            return None
        losses = np.array([[self.rows[name, rate, seed]["losses"] for rate in kept] for seed in seeds])
        return Measured(name, np.array(kept), losses, np.array(rows[0]["tokens"], dtype=float))


@dataclass(frozen=True)
class Measured:
    """Losses of a setting.

    Attributes:
        name: of the setting.
        rates: shape (R,).
        losses: summed over each conversation, shape (seeds, R, conversations).
        tokens: of each conversation.
    """

    name: str
    rates: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray

    def curve(self) -> np.ndarray:
        """Return the mean loss at each rate."""
        mean: np.ndarray = self.losses.sum(-1).mean(0) / self.tokens.sum()
        return mean

    def best(self) -> np.ndarray:
        """Return the losses at the best rate, shape (seeds, conversations)."""
        best: np.ndarray = self.losses[:, int(np.argmin(self.curve()))]
        return best

    @property
    def at_edge(self) -> bool:
        """Whether the lowest loss is at the end of the grid."""
        return int(np.argmin(self.curve())) in (0, len(self.rates) - 1)

    def series(self, color: int) -> Series:
        """Return its curve over the logarithm of the rate."""
        points = [(math.log10(rate), loss) for rate, loss in zip(self.rates, self.curve(), strict=True)]
        return Series(self.name, points, color)


def best_log_rate(losses: np.ndarray, rates: np.ndarray) -> float:
    """Return the log10 of the lowest point of the parabola through the lowest loss and its neighbors."""
    logs, place = np.log10(rates), int(np.argmin(losses))
    if place in (0, len(rates) - 1):
        return float(logs[place])
    a, b, c = losses[place - 1 : place + 2]
    bend = a - 2 * b + c
    offset = 0.0 if bend <= 0 else min(0.5, max(-0.5, (a - c) / (2 * bend)))
    return float(logs[place] + offset * (logs[1] - logs[0]))


def rate_ratio(one: Measured, other: Measured, draws: int = 2000) -> tuple[float, float, float]:
    """Return how many times higher the best rate of `one` is, with a 95 % interval."""
    draw = np.random.default_rng(0)
    seeds, _, count = one.losses.shape
    found = []
    for number in range(draws + 1):
        chosen = draw.integers(0, count, count) if number else np.arange(count)
        which = draw.integers(0, seeds, seeds) if number else np.arange(seeds)
        logs = [best_log_rate(m.losses[which][:, :, chosen].sum(-1).mean(0), m.rates) for m in (one, other)]
        found.append(logs[0] - logs[1])
    low, high = np.percentile(found[1:], [2.5, 97.5])
    # Each rate is known to a quarter of a step of the grid at best.
    slack = math.log10(GRID_STEP) / 2
    return 10 ** found[0], 10 ** (low - slack), 10 ** (high + slack)


def difference(one: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """Return by how much the loss of `one` is higher, with two standard errors over conversations and seeds."""
    per_seed = (one - other).sum(-1) / tokens.sum()
    value = float(per_seed.mean())
    mean = (one - other).mean(0)
    count = len(tokens)
    over = math.sqrt(count / (count - 1) * float(((mean - value * tokens) ** 2).sum())) / tokens.sum()
    seeds = float(per_seed.std(ddof=1)) / math.sqrt(len(per_seed)) if len(per_seed) > 1 else 0.0
    error = 2 * math.hypot(float(over), seeds)
    return value, value - error, value + error


@dataclass(frozen=True)
class Law:
    """A law, what was found, and the curves that show it."""

    title: str
    source: str
    found: str
    of_numbers: str
    curves: list[Measured]

    @property
    def verdict(self) -> str:
        """The verdict; none can be given where a best rate was not found."""
        return "cannot be told at this size" if any(one.at_edge for one in self.curves) else self.of_numbers


def within(low: float, high: float, bounds: tuple[float, float]) -> str:
    """Return the verdict on an interval that should lie within bounds."""
    if bounds[0] <= low and high <= bounds[1]:
        return "holds"
    return "does not hold" if high < bounds[0] or low > bounds[1] else "cannot be told at this size"


_THINKING = "[LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)"


def judge(results: Results) -> Iterable[Law]:
    """Yield the laws whose runs are there."""
    full, r16, r2, r64 = (results.of(name) for name in ("full", "LoRA r16", "LoRA r2", "LoRA r64"))
    if r16 is None:
        return
    level = float(r16.best().sum(-1).mean() / r16.tokens.sum())
    if full is not None:
        ratio = rate_ratio(r16, full)
        found = f"{ratio[0]:.1f} times ({ratio[1]:.1f} to {ratio[2]:.1f}); it holds within 5 to 20"
        verdict = within(ratio[1], ratio[2], (5, 20))
        yield Law("LoRA's best rate is about ten times full fine-tuning's", _THINKING, found, verdict, [full, r16])
    if r2 is not None and r64 is not None:
        ratio = rate_ratio(r64, r2)
        found = f"rank 64 wants {ratio[0]:.2f} times the rate of rank 2 ({ratio[1]:.2f} to {ratio[2]:.2f}); it holds "
        found += "within 1/2 to 2"
        verdict = within(ratio[1], ratio[2], (0.5, 2))
        yield Law("The best rate hardly depends on the rank at fixed alpha", _THINKING, found, verdict, [r2, r16, r64])
    attention, layers = results.of("attention alone"), results.of("all layers")
    if attention is not None and layers is not None:
        gap = difference(attention.best(), layers.best(), layers.tokens)
        found = f"attention alone is {_nats(gap)} above all layers"
        title = "All layers beat attention alone at equal parameters"
        yield Law(title, _THINKING, found, _above(gap), [layers, attention])
    large, full_large = results.of("LoRA r16, batch x 8"), results.of("full, batch x 8")
    if full is not None and large is not None and full_large is not None:
        cost = (large.best() - r16.best()) - (full_large.best() - full.best())
        gap = difference(cost, np.zeros_like(cost), r16.tokens)
        found = f"at eight times the batch and the same tokens, LoRA loses {_nats(gap)} more than full"
        title = "Large batches cost LoRA more than full fine-tuning"
        yield Law(title, _THINKING, found, _above(gap), [r16, large, full, full_large])
    if r2 is not None and r64 is not None:
        gap = difference(r2.best(), r64.best(), r16.tokens)
        found = f"rank 2 is {_nats(gap)} above rank 64"
        title = "More rank learns more where parameters are fewer than tokens (capacity)"
        yield Law(title, _THINKING, found, _above(gap), [r2, r16, r64])
    variants = [one for name in ("DoRA", "PiSSA", "rsLoRA") if (one := results.of(name)) is not None]
    if variants:
        gaps = [difference(one.best(), r16.best(), r16.tokens) for one in variants]
        found = "; ".join(f"{one.name} {_nats(gap)}" for one, gap in zip(variants, gaps, strict=True))
        inside = [within(gap[1] / level, gap[2] / level, (-2 * _TIE, 2 * _TIE)) for gap in gaps]
        source = "[arXiv 2602.04998](https://arxiv.org/abs/2602.04998)"
        found = f"above LoRA: {found}; it holds within 1 %"
        yield Law("Variants tie once each has its rate", source, found, _joined(inside), [r16, *variants])
    qlora = results.of("QLoRA (NF4)")
    if qlora is not None:
        gap = difference(qlora.best(), r16.best(), r16.tokens)
        found = f"QLoRA is {_nats(gap)} above LoRA on the unquantized base; it holds within 0.5 %"
        verdict = within(gap[1] / level, gap[2] / level, (-_TIE, _TIE))
        source = "[QLoRA](https://arxiv.org/abs/2305.14314)"
        yield Law("NF4 equals 16 bits", source, found, verdict, [r16, qlora])


def _nats(found: tuple[float, float, float]) -> str:
    return f"{found[0]:+.4f} nats per token ({found[1]:+.4f} to {found[2]:+.4f})"


def _above(gap: tuple[float, float, float]) -> str:
    return "holds" if gap[1] > 0 else "does not hold" if gap[2] < 0 else "cannot be told at this size"


def _joined(verdicts: list[str]) -> str:
    unlike = [one for one in verdicts if one != "holds"]
    return "does not hold" if "does not hold" in unlike else unlike[0] if unlike else "holds"


def run(arguments: argparse.Namespace, results: Results, plan: Iterable[Setting]) -> None:
    """Train what is missing; go on beyond the end of the rates where the lowest loss is, as `train --find-lr` does."""
    for setting in plan:
        rates = sorted({rate for name, rate, _ in results.rows if name == setting.name} | set(setting.grid()))
        while True:
            for seed in range(arguments.seeds):
                missing = [rate for rate in rates if (setting.name, rate, seed) not in results.rows]
                if missing:
                    train(arguments, results, setting, seed, missing)
            found = results.of(setting.name)
            if found is None or not found.at_edge or len(rates) >= setting.rates + _MAX_MORE:
                break
            is_first = int(np.argmin(found.curve())) == 0
            further = found.rates[0] / GRID_STEP if is_first else found.rates[-1] * GRID_STEP
            if float(f"{further:.2e}") in rates:
                break  # It failed.
            rates = sorted([*rates, float(f"{further:.2e}")])


def train(arguments: argparse.Namespace, results: Results, setting: Setting, seed: int, rates: list[float]) -> None:
    """Train a setting at some rates."""
    steps = max(1, arguments.steps // setting.batch)
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": {"name": str(arguments.model), "dtype": arguments.dtype}, **setting.sections,
            "chat": {"template": "starchat"}, "output_dir": str(Path(folder, "run")),
            "data": {"train": [{"path": str(arguments.train)}], "eval": [{"path": str(arguments.eval)}],
                     "max_length": arguments.max_length},
            "training": {"seed": seed, "max_steps": steps, "per_device_train_batch_size": 2,
                         "gradient_accumulation_steps": setting.batch, "gradient_checkpointing": False,
                         "torch_compile": False},
        }  # fmt: skip
        file = Path(folder, "recipe.yaml")
        file.write_text(json.dumps(recipe), encoding="utf-8")
        loaded = load_recipe(file)
        runs = ShortRuns(loaded, resolve_distributed(loaded), Path(folder, "run"), steps)
        for rate in rates:
            trial = runs.train(rate)
            row = {"setting": setting.name, "rate": rate, "seed": seed, "problem": trial.problem,
                   "losses": [one.loss for one in trial.held_out], "tokens": [one.tokens for one in trial.held_out],
                   "before": runs.loss_before}  # fmt: skip
            results.add(row)
            print(f"{setting.name}, seed {seed}: {trial}", flush=True)


def write(laws: list[Law], arguments: argparse.Namespace, docs: Path) -> None:
    """Write the page and its plots."""
    pages = [
        "# Published laws, run again\n",
        f"Written by `scripts/laws.py`. Each run has {arguments.steps} steps of two packs of {arguments.max_length} "
        f"tokens on\n`{Path(arguments.model).name}`, with {arguments.seeds} seeds. Losses are held-out, in nats per "
        "supervised token.\n",
        *([f"- Data: {arguments.data}."] if arguments.data else []),
        "- Rates are a factor of 2.15 apart. Where a lowest loss is at the end of its rates, no verdict is given.",
        "- Differences are those at each side's best rate, paired by conversation and seed.",
        "- Intervals are two standard errors over conversations and seeds; with two seeds the part of seeds is rough.",
        "- Small models need not show the laws of large ones, and short runs say little about long ones.",
        "- What forgets most is not among them.",
        f"- All runs are of `{Path(arguments.model).name}`: no law was tried on another model for this page.",
        "- Other models and data can be given; an interrupted script goes on from its file of results.\n",
        "| law | found | verdict |\n|---|---|---|",
        *(f"| {law.title} ({law.source}) | {law.found}{_edges(law)} | **{law.verdict}** |" for law in laws),
    ]
    (docs / "pictures").mkdir(exist_ok=True)
    for number, law in enumerate(laws, 1):
        series = [one.series(color) for color, one in enumerate(law.curves)]
        plot = str(line_plot(series, label=law.title, x_name="log10 of the learning rate"))
        svg = plot.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{_STYLE}", 1)
        name = f"pictures/law-{number}.svg"
        (docs / name).write_text(svg + "\n", encoding="utf-8")
        pages.append(f"\n## {law.title}\n\nHeld-out loss over the rate: **{law.verdict}**.\n\n![{law.title}]({name})")
    (docs / "laws.md").write_text("\n".join(pages) + "\n", encoding="utf-8")


def _edges(law: Law) -> str:
    names = [one.name for one in law.curves if one.at_edge]
    return f". The lowest loss of {', '.join(names)} is at the end of its rates" if names else ""


def main() -> None:
    """Run what is missing, print the verdicts, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--center", type=float, default=3.4e-3, help="about LoRA's best rate (train --find-lr)")
    parser.add_argument(
        "--attention-rank", type=int, default=11, help="rank that has as many parameters as 4 on all layers"
    )
    parser.add_argument("--write", type=Path, help="the docs folder")
    parser.add_argument("--data", help="what the data is, for the page")
    parser.add_argument("--settings", nargs="+", help="train these alone, by name")
    parser.add_argument("--only-judge", action="store_true", help="judge the runs that are there")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    results.read()
    if not arguments.only_judge:
        plan = settings(arguments.center, arguments.attention_rank)
        run(arguments, results, [plan[name] for name in arguments.settings or plan])
    laws = list(judge(results))
    for law in laws:
        print(f"{law.verdict}: {law.title}: {law.found}")
    if arguments.write:
        write(laws, arguments, arguments.write)


if __name__ == "__main__":
    main()
