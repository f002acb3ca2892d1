"""Published laws, judged by the runs of `laws.py`; other scripts import this.

Losses are held-out, in nats per supervised token. Differences are those at each side's best rate, paired by
conversation and seed; intervals are two standard errors over both. Intervals of best rates come from drawing
conversations and seeds again and again.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from laws_results import Measured, Results

from peftchat.comparing.paired_statistics import ONE_SEED_NOISE
from peftchat.formatting import format_count
from peftchat.reports.svg import Series
from peftchat.training.rate_trials import GRID_STEP

UNKNOWN = "cannot be told at this size"

_TIE = 0.005
"""Relative difference below which two losses count as equal, as in `compare`."""

_THINKING = "[LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)"

TITLES = (
    "LoRA's best rate is about ten times full fine-tuning's",
    "The best rate hardly depends on the rank at fixed alpha",
    "All layers beat attention alone at equal parameters",
    "Large batches cost LoRA more than full fine-tuning",
    "More rank learns more where parameters are fewer than tokens (capacity)",
    "Variants tie once each has its rate",
    "NF4 equals 16 bits",
    "Full fine-tuning forgets more than LoRA",
)


@dataclass(frozen=True)
class Law:
    """A law, what was found, and the curves that show it.

    Attributes:
        title, source: the law, and who published it.
        found: what was found, with its interval.
        of_numbers: the verdict by the interval alone.
        curves: the settings that it is about.
        y_name: what their plot shows.
        is_testable: whether the runs meet the condition that the law states.
    """

    title: str
    source: str
    found: str
    of_numbers: str
    curves: Sequence[Measured]
    y_name: str = "held-out loss"
    is_testable: bool = True

    @property
    def verdict(self) -> str:
        """The verdict; none can be given where a best rate was not found."""
        return UNKNOWN if self.at_edge or not self.is_testable else self.of_numbers

    @property
    def at_edge(self) -> list[str]:
        """The settings whose lowest loss is at the end of their rates."""
        return [one.name for one in self.curves if one.at_edge]

    def series(self) -> list[Series]:
        """Return the lines of its plot."""
        of_general = self.y_name != "held-out loss"
        return [one.series(color, of_general=of_general) for color, one in enumerate(self.curves)]


def judge(results: Results) -> list[Law]:
    """Return the laws whose runs are there."""
    laws = (
        _rate_of_full, _rate_of_ranks, _attention_alone, _large_batches, _capacity, _variants, _quantized, _forgetting
    )  # fmt: skip
    return [found for law in laws if (found := law(results)) is not None]


def _rate_of_full(results: Results) -> Law | None:
    if not (both := _together(results, "full", "LoRA r16")):
        return None
    full, r16 = both
    ratio = rate_ratio(r16, full)
    found = f"{ratio[0]:.1f} times ({ratio[1]:.1f} to {ratio[2]:.1f}); it holds within 5 to 20"
    return Law(TITLES[0], _THINKING, found, _within(ratio[1], ratio[2], (5, 20)), both)


def _rate_of_ranks(results: Results) -> Law | None:
    if not (ranks := _together(results, "LoRA r2", "LoRA r16", "LoRA r64")):
        return None
    ratio = rate_ratio(ranks[2], ranks[0])
    found = f"rank 64 wants {ratio[0]:.2f} times the rate of rank 2 ({ratio[1]:.2f} to {ratio[2]:.2f}); it holds "
    found += "within 1/2 to 2"
    return Law(TITLES[1], _THINKING, found, _within(ratio[1], ratio[2], (0.5, 2)), ranks)


def _attention_alone(results: Results) -> Law | None:
    if not (both := _together(results, "all layers", "attention alone")):
        return None
    gap = difference(both[1].best(), both[0].best(), both[0].tokens)
    found = f"attention alone is {_nats(gap)} above all layers"
    return Law(TITLES[2], _THINKING, found, _above(gap), both)


def _large_batches(results: Results) -> Law | None:
    names = ("LoRA r16", "LoRA r16, batch x 8", "full", "full, batch x 8")
    if not (four := _together(results, *names)):
        return None
    r16, large, full, full_large = four
    cost = (large.best() - r16.best()) - (full_large.best() - full.best())
    gap = difference(cost, np.zeros_like(cost), r16.tokens, level=_level(r16))
    found = f"at eight times the batch and the same tokens, LoRA loses {_nats(gap)} more than full"
    return Law(TITLES[3], _THINKING, found, _above(gap), four)


def _capacity(results: Results) -> Law | None:
    if not (ranks := _together(results, "LoRA r2", "LoRA r16", "LoRA r64")):
        return None
    gap = difference(ranks[0].best(), ranks[2].best(), ranks[0].tokens)
    row = next(row for (name, _, _), row in results.rows.items() if name == "LoRA r2" and row["losses"])
    found = (
        f"rank 2 is {_nats(gap)} above rank 64; it has {format_count(row['trained'])} parameters for "
        f"{format_count(row['supervised'])} supervised tokens"
    )
    is_testable = row["trained"] < row["supervised"]
    if not is_testable:
        found += ", so the law's condition is not met"
    return Law(TITLES[4], _THINKING, found, _above(gap), ranks, is_testable=is_testable)


def _variants(results: Results) -> Law | None:
    names = [name for name in ("DoRA", "PiSSA", "rsLoRA") if results.seeds(name)]
    if not names or not (all_of_them := _together(results, "LoRA r16", *names)):
        return None
    r16, *variants = all_of_them
    gaps = [difference(one.best(), r16.best(), r16.tokens) for one in variants]
    found = "; ".join(f"{one.name} {_nats(gap)}" for one, gap in zip(variants, gaps, strict=True))
    inside = [_within(gap[1] / _level(r16), gap[2] / _level(r16), (-2 * _TIE, 2 * _TIE)) for gap in gaps]
    source = "[arXiv 2602.04998](https://arxiv.org/abs/2602.04998)"
    found = f"above LoRA: {found}; it holds within 1 %"
    return Law(TITLES[5], source, found, _joined(inside), all_of_them)


def _quantized(results: Results) -> Law | None:
    if not (both := _together(results, "LoRA r16", "QLoRA (NF4)")):
        return None
    r16, qlora = both
    gap = difference(qlora.best(), r16.best(), r16.tokens)
    found = f"QLoRA is {_nats(gap)} above LoRA on the unquantized base; it holds within 0.5 %"
    verdict = _within(gap[1] / _level(r16), gap[2] / _level(r16), (-_TIE, _TIE))
    return Law(TITLES[6], "[QLoRA](https://arxiv.org/abs/2305.14314)", found, verdict, both)


def _forgetting(results: Results) -> Law | None:
    if not (both := _together(results, "full", "LoRA r16")):
        return None
    full, r16 = both
    tokens = full.general[0, 0, :, 1]
    gap = difference(full.best_general(), r16.best_general(), tokens)
    before = sum(loss for loss, _ in results.untrained) / tokens.sum()
    rises = sorted(
        (float(one.best_general().sum(-1).mean() / tokens.sum() - before), name)
        for name in results.names
        if (one := results.of(name, results.seeds(name))) is not None
    )
    listed = ", ".join(f"{name} {rise:+.3f}" for rise, name in reversed(rises))
    found = (
        f"full fine-tuning is {_nats(gap)} above LoRA on general text. Change from {before:.3f} before training, each "
        f"at its best rate, most first: {listed}"
    )
    is_testable = any(rise > 0 for rise, name in rises if name in ("full", "LoRA r16"))
    if not is_testable:
        found += ". Neither rises, so nothing was forgotten"
    source = "[LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673)"
    return Law(TITLES[7], source, found, _above(gap), both, "loss on general text", is_testable)


def _together(results: Results, *names: str) -> list[Measured]:
    """Return some settings over the seeds that they have in common, on which they are paired; empty if one lacks."""
    seeds = set.intersection(*(results.seeds(name) for name in names))
    found = [results.of(name, seeds) for name in names]
    complete = [one for one in found if one is not None]
    return complete if len(complete) == len(names) else []


def _level(one: Measured) -> float:
    return float(one.best().sum(-1).mean() / one.tokens.sum())


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


def difference(
    one: np.ndarray, other: np.ndarray, tokens: np.ndarray, level: float | None = None
) -> tuple[float, float, float]:
    """Return by how much the loss of `one` is higher, with two standard errors over conversations and seeds.

    With one seed, a part of the loss is added on both sides, as `compare` does: a guess at the noise of runs.

    Args:
        one, other: summed losses, shape (seeds, conversations).
        tokens: of each conversation.
        level: the loss per token that this part is of; None for that of `other`.
    """
    per_seed = (one - other).sum(-1) / tokens.sum()
    value = float(per_seed.mean())
    mean = (one - other).mean(0)
    count = len(tokens)
    over = math.sqrt(count / (count - 1) * float(((mean - value * tokens) ** 2).sum())) / tokens.sum()
    if len(per_seed) > 1:
        error = 2 * math.hypot(float(over), float(per_seed.std(ddof=1)) / math.sqrt(len(per_seed)))
    else:
        error = 2 * float(over) + ONE_SEED_NOISE * (level or float(other.sum() / tokens.sum()))
    return value, value - error, value + error


def _nats(found: tuple[float, float, float]) -> str:
    return f"{found[0]:+.4f} nats per token ({found[1]:+.4f} to {found[2]:+.4f})"


def _within(low: float, high: float, bounds: tuple[float, float]) -> str:
    """Return the verdict on an interval that should lie within bounds."""
    if bounds[0] <= low and high <= bounds[1]:
        return "holds"
    return "does not hold" if high < bounds[0] or low > bounds[1] else UNKNOWN


def _above(gap: tuple[float, float, float]) -> str:
    return "holds" if gap[1] > 0 else "does not hold" if gap[2] < 0 else UNKNOWN


def _joined(verdicts: Iterable[str]) -> str:
    unlike = [one for one in verdicts if one != "holds"]
    return "does not hold" if "does not hold" in unlike else unlike[0] if unlike else "holds"
