"""Measure how often the statistics of `peftchat compare` are right, on made-up runs whose true differences are known.

    python scripts/calibrate_compare.py --worlds 1000
    python scripts/calibrate_compare.py --worlds 600 --pairs

Each world has conversations in trees, seeds, variants and learning rates. Losses of a variant differ from the common
difficulty of a conversation by noise of the tree, of the conversation, of the run and of the conversation in one run.
The first three are drawn from Student's t with 3 degrees of freedom, whose tails are heavy. Lengths of conversations
are lognormal and sizes of trees geometric. The rate of each variant is chosen on the first seed, as `compare` does.

With `--pairs`, held-out preference pairs are right or wrong instead: a pair is right where its margin is above 0.
Margins have the same kinds of noise, with normal tails, so that the true share of right pairs is known. The rate is
chosen by the loss of the margins, as `compare` does.

The table has, for each kind of world: how often the 95 % interval of a pair holds the true difference; in how many
worlds of equal variants a single one is called better or worse; how many of the pairs that differ are told apart; and
how often a worse variant is called better.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from peftchat.comparing.measure import LOSS, PAIRS, Measure
from peftchat.comparing.paired_statistics import (
    NEGLIGIBLE,
    PairedComparison,
    PairedLosses,
    compare_paired,
    compare_shares,
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scenario:
    """A kind of world; noise is in nats per token.

    Attributes:
        name: in the table.
        gaps: how much the loss of each variant at its best rate is above the first one's.
        seeds, trees, rates: how many.
        run: noise of a run.
        uneven: standard deviation of the logarithm of the variants' noise of runs.
        flat: whether all rates of a variant are equally good; otherwise each is worse by 0.05 a step from the best.
        one_rate: whether the first variant is tried at one rate only.
    """

    name: str
    gaps: tuple[float, ...]
    seeds: int = 3
    trees: int = 60
    rates: int = 5
    run: float = 0.01
    uneven: float = 0.5
    flat: bool = False
    one_rate: bool = False


_TREE_NOISE, _CONVERSATION_NOISE, _SINGLE_NOISE = 0.04, 0.08, 0.03


SCENARIOS = (
    Scenario("2 equal, 3 seeds", (0, 0)),
    Scenario("2 equal, 7 rates all equal, the first at one", (0, 0), one_rate=True, rates=7, flat=True),
    Scenario("2 equal, 1 seed", (0, 0), seeds=1),
    Scenario("2 equal, 2 seeds", (0, 0), seeds=2),
    Scenario("2 equal, 12 trees", (0, 0), trees=12),
    Scenario("2 equal, large noise of runs", (0, 0), run=0.04),
    Scenario("4 equal, 7 rates", (0,) * 4, rates=7),
    Scenario("8 equal, 5 rates", (0,) * 8),
    Scenario("8 equal, 5 rates all equal", (0,) * 8, flat=True),
    Scenario("8 equal, 7 rates, 300 trees", (0,) * 8, rates=7, trees=300),
    Scenario("8 equal, 1 seed", (0,) * 8, seeds=1),
    Scenario("8 equal, 2 seeds", (0,) * 8, seeds=2),
    Scenario("8 equal, large uneven noise of runs", (0,) * 8, run=0.04, uneven=0.8),
    Scenario("4, gaps of 0.05", (0, 0.05, 0.1, 0.15)),
    Scenario("8, one better by 0.05", (0, *(0.05,) * 7)),
    Scenario("8, one better by 0.1, 7 rates", (0, *(0.1,) * 7), rates=7),
    Scenario("8, one better by 0.05, 300 trees", (0, *(0.05,) * 7), trees=300),
)


PAIR_SCENARIOS = (
    Scenario("2 at 70 %, 3 seeds", (0.3, 0.3)),
    Scenario("2 at 70 %, 1 seed", (0.3, 0.3), seeds=1),
    Scenario("2 at 70 %, 12 prompts", (0.3, 0.3), trees=12),
    Scenario("2 at 70 %, 300 prompts", (0.3, 0.3), trees=300),
    Scenario("2 at 97 %, 3 seeds", (0.03, 0.03)),
    Scenario("2 at 99.9 %, 3 seeds", (0.001, 0.001), flat=True),
    Scenario("2 at 70 %, large noise of runs", (0.3, 0.3), run=0.3),
    Scenario("4 at 60 %, 7 rates", (0.4,) * 4, rates=7),
    Scenario("8 at 80 %, 5 rates", (0.2,) * 8),
    Scenario("8 at 80 %, 5 rates all equal", (0.2,) * 8, flat=True),
    Scenario("8 at 80 %, 1 seed", (0.2,) * 8, seeds=1),
    Scenario("4 at 70 % to 85 %", (0.3, 0.25, 0.2, 0.15)),
    Scenario("8, one at 80 % and the others at 70 %", (0.2, *(0.3,) * 7)),
    Scenario("8, one at 80 % and the others at 70 %, 300 prompts", (0.2, *(0.3,) * 7), trees=300),
)
"""Kinds of worlds of pairs: `gaps` are shares of wrong pairs, and noise is in standard deviations of a margin."""

_COMMON, _OWN_TREE, _OWN_CASE, _SINGLE = 0.6, 0.15, 0.15, 0.1
"""Variances of a margin, beside that of runs: what all variants share (half of it by prompt), and what they do not."""

_RUN_OF_PAIRS = 0.05
"""Noise of a run where a kind does not say another."""


@dataclass(frozen=True)
class World:
    """Made-up losses, or pairs that are wrong.

    Attributes:
        sums: summed losses, shape (variants, rates, seeds, conversations).
        tokens, trees: of each conversation.
        levels: the true loss of every variant and rate.
        truth: the same; with one seed, of the runs themselves.
        selected_by: what the first seed's rates are chosen by, shape (variants, rates).
        measure: what is compared.
    """

    sums: Floats
    tokens: Floats
    trees: npt.NDArray[np.int64]
    levels: Floats
    truth: Floats
    selected_by: Floats
    measure: Measure


def make_pair_world(scenario: Scenario, generator: np.random.Generator) -> World:
    """Draw a world of pairs."""
    variants, rates, seeds = len(scenario.gaps), scenario.rates, scenario.seeds
    run = scenario.run if scenario.run != Scenario.run else _RUN_OF_PAIRS
    trees = np.repeat(np.arange(scenario.trees), generator.geometric(0.4, scenario.trees))
    count = len(trees)

    def normal(variance: float, *shape: int) -> Floats:
        return generator.normal(0, np.sqrt(variance), shape)

    best = generator.integers(0, rates, variants)
    steps = np.abs(np.arange(rates)[None] - best[:, None])
    # Each step from the best rate costs a tenth of the way to an even chance.
    levels = 0.5 - (0.5 - np.array(scenario.gaps)[:, None]) * (1 - (0.0 if scenario.flat else 0.1) * steps)
    rest = _COMMON + _OWN_TREE + _OWN_CASE + _SINGLE
    quantile, share = np.vectorize(NormalDist().inv_cdf), np.vectorize(NormalDist().cdf)
    means = -np.sqrt(rest + run**2) * quantile(levels)
    runs = normal(run**2, variants, rates, seeds)
    common = normal(_COMMON / 2, scenario.trees)[trees] + normal(_COMMON / 2, count)
    of_data = normal(_OWN_TREE, variants, rates, scenario.trees)[..., trees] + normal(_OWN_CASE, variants, rates, count)
    margins = (
        (means[..., None] + runs)[..., None]
        + (common + of_data)[:, :, None]
        + normal(_SINGLE, variants, rates, seeds, count)
    )
    truth = share(-(means + runs[..., 0]) / np.sqrt(rest)) if seeds == 1 else levels
    losses = np.logaddexp(0, -margins[:, :, 0]).mean(axis=2)
    return World((margins < 0).astype(float), np.ones(count), trees, levels, truth, losses, PAIRS)


def make_world(scenario: Scenario, generator: np.random.Generator) -> World:
    """Draw a world of conversations."""
    variants, rates, seeds = len(scenario.gaps), scenario.rates, scenario.seeds
    trees = np.repeat(np.arange(scenario.trees), generator.geometric(0.4, scenario.trees))
    count = len(trees)
    tokens = np.round(np.exp(generator.normal(4.5, 0.9, count))) + 1

    def heavy(*shape: int) -> Floats:
        return generator.standard_t(3, shape) / np.sqrt(3)

    def shared(deviation: float, places: npt.NDArray[np.int64]) -> Floats:
        # Half of the variance is the variant's own, and half that of its rate.
        number = int(places.max()) + 1
        drawn = heavy(variants, 1, number) + heavy(variants, rates, number)
        return (deviation * np.sqrt(0.5) * drawn)[..., places]

    best = generator.integers(0, rates, variants)
    steps = np.abs(np.arange(rates)[None] - best[:, None])
    levels = np.array(scenario.gaps)[:, None] + (0.0 if scenario.flat else 0.05) * steps
    scale = np.exp(generator.normal(0, scenario.uneven, (variants, 1, 1)))
    runs = scenario.run * scale * heavy(variants, rates, seeds)
    difficulty = generator.normal(2, 0.5, count) + generator.normal(0, 0.02, (seeds, 1))
    of_data = shared(_TREE_NOISE, trees) + shared(_CONVERSATION_NOISE, np.arange(count))
    losses = (
        difficulty
        + (levels[..., None] + runs)[..., None]
        + of_data[:, :, None]
        + _SINGLE_NOISE * scale[..., None] * heavy(variants, rates, seeds, count)
    )
    truth = levels + runs[..., 0] if seeds == 1 else levels
    sums = losses * tokens
    return World(sums, tokens, trees, levels, truth, sums[:, :, 0].sum(axis=2), LOSS)


def judge(scenario: Scenario, world: World) -> tuple[PairedComparison, Floats, Floats]:
    """Choose the rate of each variant on the first seed, and compare; return `levels` and `truth` at these rates."""
    chosen = world.selected_by.argmin(axis=1)
    if scenario.one_rate:
        chosen[0] = scenario.rates // 2
    rows = np.arange(len(chosen))
    compare = compare_shares if world.measure.is_share else compare_paired
    compared = compare(PairedLosses(world.sums[rows, chosen], world.tokens, world.trees))
    return compared, world.levels[rows, chosen], world.truth[rows, chosen]


@dataclass
class Counts:
    """What happened in the worlds of a scenario."""

    covered: float = 0.0
    pairs: int = 0
    any_false: int = 0
    equal_tied: int = 0
    equal_pairs: int = 0
    told_apart: int = 0
    different_pairs: int = 0
    wrong: int = 0
    worlds: int = 0


def count_worlds(scenario: Scenario, worlds: int, seed: int, make: Callable[..., World] = make_world) -> Counts:
    """Judge many worlds."""
    generator = np.random.default_rng(seed)
    counts = Counts(worlds=worlds)
    for _ in range(worlds):
        world = make(scenario, generator)
        compared, levels, truth = judge(scenario, world)
        threshold = world.measure.threshold(float(compared.losses.min()), scenario.seeds, NEGLIGIBLE)
        false = False
        for one in range(len(truth)):
            for other in range(one + 1, len(truth)):
                gap, true_gap = compared.gap(one, other), truth[other] - truth[one]
                assert gap.margin is not None
                counts.pairs += 1
                counts.covered += abs(gap.mean - true_gap) <= gap.margin
                told = compared.is_different(one, other, threshold)
                if levels[one] == levels[other]:
                    counts.equal_pairs += 1
                    counts.equal_tied += not told
                    false |= told
                else:
                    counts.different_pairs += 1
                    counts.told_apart += told
                    counts.wrong += told and gap.mean * true_gap < 0
        counts.any_false += false
    return counts


def percent(part: float, whole: int) -> str:
    """Format a fraction, or a dash where there was nothing to count."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def table_row(scenario: Scenario, counts: Counts) -> str:
    """Return a row of the Markdown table."""
    cells = (
        scenario.name,
        percent(counts.covered, counts.pairs),
        percent(counts.any_false, counts.worlds if counts.equal_pairs else 0),
        percent(counts.equal_tied, counts.equal_pairs),
        percent(counts.told_apart, counts.different_pairs),
        percent(counts.wrong, counts.different_pairs),
    )
    return f"| {' | '.join(cells)} |"


HEADER = """| variants | intervals that hold the truth | worlds with a false "better" | equal pairs called tied | \
unequal pairs told apart | of these, wrongly |
|---|---:|---:|---:|---:|---:|"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose names have this text")
    parser.add_argument("--pairs", action="store_true", help="preference pairs that are right or wrong")
    options: Any = parser.parse_args(arguments)
    print(HEADER)
    make = make_pair_world if options.pairs else make_world
    for scenario in PAIR_SCENARIOS if options.pairs else SCENARIOS:
        if options.only in scenario.name:
            print(table_row(scenario, count_worlds(scenario, options.worlds, options.seed, make)), flush=True)


if __name__ == "__main__":
    main()
