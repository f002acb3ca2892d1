"""What candidates are compared by: held-out loss, or the share of held-out pairs or labeled answers that are right."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.comparing.paired_statistics import Gap, practical_threshold
from peftchat.formatting import format_percent

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

ONE_SEED_SHARE = 0.02
"""Difference of a share that stands for the noise of runs with a single seed. It is a guess."""


@dataclass(frozen=True, slots=True)
class CaseScore:
    """A held-out pair or labeled answer under the model of a run.

    Attributes:
        source: where it came from, `file:line`.
        right: 1 where it is right, a half where nothing tells, else 0.
        margin: of a pair, in nats: how much more the chosen answer rose than the rejected one.
    """

    source: str
    right: float
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """What candidates are compared by. The statistics count what is wrong, so that lower is better in all of them.

    Attributes:
        key: in `comparison.json`.
        title: of its column.
        cases: what is held out, in words.
        value_name: what is measured, in a sentence.
        explanation: when a case is right, in a sentence.
    """

    key: Literal["loss", "pairs_right", "answers_right"]
    title: str
    cases: str
    value_name: str
    explanation: str = ""

    @property
    def is_share(self) -> bool:
        """Whether it is a share of cases that are right."""
        return self.key != "loss"

    @property
    def has_pairs(self) -> bool:
        """Whether the cases are pairs."""
        return self.key == "pairs_right"

    def format(self, value: float) -> str:
        """Format a value; a loss has three decimals, as further digits are noise in every run."""
        return format_percent(value) if self.is_share else f"{value:.3f}"

    def format_wrong(self, value: float) -> str:
        """Format what the statistics count."""
        return self.format(1 - value if self.is_share else value)

    def format_difference(self, value: float) -> str:
        """Format a difference without its sign."""
        return f"{100 * value:.1f} points" if self.is_share else f"{value:.3f}"

    def format_interval(self, value: float, margin: float | None) -> str:
        """Format a value with half its interval, if there is one: `2.314 ± 0.021`."""
        if margin is None:
            return self.format(value)
        return f"{self.format(value)} ± {100 * margin:.1f}" if self.is_share else f"{value:.3f} ± {margin:.3f}"

    def format_gap(self, gap: Gap) -> str:
        """Format a difference with the interval that holds for all pairs of candidates: `+0.021 ± 0.004`."""
        scale, digits = (-100.0, 1) if self.is_share else (1.0, 3)
        margin = "" if gap.margin_together is None else f" ± {abs(scale) * gap.margin_together:.{digits}f}"
        # No minus before a zero.
        return f"{scale * gap.mean + 0.0:+.{digits}f}{margin}{' points' if self.is_share else ''}"

    def threshold(self, lowest: float, num_seeds: int, negligible: float) -> float:
        """Return the difference up to which values count as equal.

        Args:
            lowest: what the statistics count, of the best candidate.
            num_seeds: runs of each candidate.
            negligible: a part of the loss, or a difference of shares.
        """
        if not self.is_share:
            return practical_threshold(lowest, num_seeds, negligible)
        return negligible if num_seeds > 1 else max(negligible, ONE_SEED_SHARE)


LOSS = Measure("loss", "held-out loss", "conversations", "held-out loss")
PAIRS = Measure(
    "pairs_right",
    "pairs right",
    "pairs",
    "share of right pairs",
    "A pair is right where training raised the log-probability of its chosen answer by more than that of its rejected "
    "one, whatever the objective.",
)
ANSWERS = Measure(
    "answers_right",
    "answers right",
    "labeled answers",
    "share of right answers",
    "An answer is right where its reward is on the side of the KL term that its label names.",
)


def measure_of(recipe: "Recipe") -> Measure:
    """Return what runs of a recipe are compared by."""
    if not recipe.has_pairs:
        return LOSS
    return ANSWERS if recipe.has_labels else PAIRS
