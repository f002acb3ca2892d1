"""Pictures of a comparison's page: losses during training and by rate, and how far each candidate is behind."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from peftchat.comparing.hyperparameter_search import LEARNING_RATE
from peftchat.comparing.outcomes import CandidateResult, Curve, RunResult
from peftchat.comparing.pair_scores import wrong
from peftchat.comparing.recommend import Recommendation
from peftchat.comparing.results import ComparisonResult
from peftchat.reports.svg import Mark, Series, interval_plot, line_plot

COLORS = 10
"""Line colors of the page; further lines reuse them, dashed."""

_MIN_POINTS_WITHOUT_FIRST = 3


@dataclass(frozen=True)
class LineStyle:
    """How a candidate is drawn in the plots."""

    name: str
    color: int
    dashed: bool


Lines = Mapping[str, LineStyle]
"""How each candidate is drawn, by name."""


def line_styles(candidates: Sequence[CandidateResult]) -> dict[str, LineStyle]:
    """Return how each candidate is drawn."""
    return {
        one.candidate.name: LineStyle(one.candidate.name, place % COLORS, place >= COLORS)
        for place, one in enumerate(candidates)
    }


def comparison_plots(
    result: ComparisonResult, finished: Sequence[CandidateResult], lines: Lines
) -> list[tuple[str, Markup]]:
    """Draw the held-out loss during training; where losses are not alike, the share that is right by own rewards."""
    alike = result.losses_are_alike
    name = "Held-out loss" if alike else "Pairs right by the objective's own reward"

    def plot(title: str, x_name: str, scaled: Callable[[RunResult, Curve], Curve]) -> tuple[str, Markup]:
        series = []
        for candidate in finished:
            line = lines[candidate.candidate.name]
            assert candidate.best is not None
            points = scaled(candidate.best, candidate.best.curve if alike else candidate.best.own_curve)
            # The drop from the first value would hide the differences between variants.
            points = points[1:] if len(points) > _MIN_POINTS_WITHOUT_FIRST else points
            series.append(Series(line.name, points, line.color, dashed=line.dashed))
        return title, line_plot(series, label=title, x_name=x_name, legend=False)

    plots = [
        plot(f"{name} by tokens", "tokens trained on", RunResult.by_tokens),
        plot(f"{name} by time", "seconds of training", RunResult.by_seconds),
    ]
    return [(title, drawn) for title, drawn in plots if drawn]


def interval_marks(recommendation: Recommendation | None, finished: Sequence[CandidateResult], lines: Lines) -> Markup:
    """Draw how far each candidate is behind the best, with intervals."""
    if recommendation is None:
        return Markup()
    lowest, marks, measure = recommendation.lowest, [], recommendation.evidence.measure
    scale = 100 if measure.is_share else 1
    for candidate in finished:
        gap = recommendation.evidence.gap(lowest, candidate)
        if gap is None:
            continue
        ours, best = ({run.job.seed: wrong(run, measure) for run in one.runs} for one in (candidate, lowest))
        singles = [scale * (ours[seed] - best[seed]) for seed in sorted(ours.keys() & best.keys())]
        together = None if candidate is lowest else gap.margin_together
        margin = None if together is None else scale * together
        name = candidate.candidate.name
        text = ("best" if measure.is_share else "lowest") if candidate is lowest else measure.format_gap(gap)
        marks.append(Mark(name, scale * gap.mean, margin, singles, lines[name].color, text))
    marks.sort(key=lambda mark: mark.value)
    x_name = "points behind the most right" if measure.is_share else "held-out loss above the lowest, nats per token"
    return interval_plot(marks, label="Gap of each candidate", x_name=x_name)


def search_plot(result: ComparisonResult, finished: Sequence[CandidateResult], lines: Lines) -> Markup:
    """Draw the loss of every rate tried; short runs where there are any, as they are of one length.

    Losses of different objectives are not drawn together.

    Rates at which a run ends no better than it began are left out: they would hide the differences between the others.
    """
    if not result.losses_are_alike:
        return Markup()
    series = []
    for candidate in finished:
        short = [run for run in candidate.trials if run.job.share < 1]
        points = sorted(
            (math.log10(rate), run.loss)
            for run in short or candidate.trials
            if run.failure is None and isinstance(rate := run.job.settings.get(LEARNING_RATE), float)
        )
        start = candidate.best.loss_before if candidate.best is not None else None
        kept = [(rate, loss) for rate, loss in points if start is None or loss < start]
        if len(kept) > 1:
            line = lines[candidate.candidate.name]
            series.append(Series(line.name, kept, line.color, dashed=line.dashed))
    title = "Held-out loss by learning rate"
    return (
        line_plot(series, label=title, x_name="learning rate, as a power of ten", legend=False) if series else Markup()
    )
