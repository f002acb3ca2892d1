"""`report.html` of a comparison: one page that needs nothing but a browser."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from peftchat.comparing.candidates import describe
from peftchat.comparing.choose import loss_words
from peftchat.comparing.outcome import Outcome
from peftchat.comparing.result import Result
from peftchat.comparing.words import HEADERS, table_rows
from peftchat.formatting import format_decimal
from peftchat.reports.intervals import Mark, interval_plot
from peftchat.reports.page import write_page
from peftchat.reports.svg import Series, line_plot

if TYPE_CHECKING:
    from peftchat.comparing.record import Curve

COLOURS = 10
"""Line colours of the page; more lines than that begin again, dashed."""

_FEW_POINTS = 3


@dataclass(frozen=True)
class Line:
    """How a candidate is drawn."""

    name: str
    colour: int
    dashed: bool


def write_comparison(path: Path, result: Result, recommended: Path) -> Path:
    """Write the page.

    Args:
        recommended: the recipe that the page tells how to run.
    """
    advice = result.recommendation
    finished = [outcome for outcome in result.outcomes if outcome.best is not None]
    lines = {
        outcome.candidate.name: Line(outcome.candidate.name, place % COLOURS, place >= COLOURS)
        for place, outcome in enumerate(result.outcomes)
    }
    return write_page(
        path,
        "compare.html.jinja",
        advice=advice,
        headers=HEADERS,
        rows=table_rows(result),
        lines=[lines[outcome.candidate.name] for outcome in finished],
        colours=COLOURS,
        plots=_plots(finished, lines),
        intervals=_intervals(finished, lines),
        sweep=[(outcome.candidate.name, _tried(outcome)) for outcome in result.outcomes],
        merges=[(one.candidate.name, one.measured) for one in finished if one.measured.merge is not None],
        answers=_answers(finished),
        failures=[(one.candidate.name, record) for one in result.outcomes for record in one.failures],
        describe=describe,
        facts=_facts(result, finished),
        base_plain_loss=result.base_plain_loss,
        command=f"peftchat train {recommended}",
        recipe=recommended.read_text(encoding="utf-8") if advice is not None and recommended.is_file() else None,
    )


def _facts(result: Result, finished: Sequence[Outcome]) -> list[str]:
    """What was the same for all, a sentence each."""
    plan = result.plan
    seeds = ", ".join(map(str, plan.seeds))
    budget = "as many steps as the recipe says" if plan.wish.budget is None else str(plan.wish.budget)
    facts = [
        f"Base: {plan.base.recipe.model.name}. Every run: {budget}, the same rows, judged by the same held-out ones.",
        f"Settings were chosen on seed {plan.seeds[0]} by held-out loss"
        + (f"; the best of each variant ran on the seeds {seeds}." if len(plan.seeds) > 1 else ", the only one."),
    ]
    if len(plan.seeds) > 1:
        facts.append(
            "± is half of Student's 95 % interval over the seeds. A seed decides about the order of rows, the start of "
            "the adapter and dropout; of one seed, all variants saw the rows in the same order, so the column “above "
            "the lowest” compares seed by seed and is sharper than two intervals side by side."
        )
    else:
        facts.append("One seed gives no interval.")
    before = {format_decimal(one.best.loss_before) for one in finished if one.best and one.best.loss_before is not None}
    if before:
        facts.append(
            f"Held-out loss before training: {' to '.join(sorted((min(before), max(before))[: len(before)]))}."
        )
    return facts


def _plots(finished: Sequence[Outcome], lines: dict[str, Line]) -> list[tuple[str, Markup]]:
    def drawn(title: str, x_name: str, curve: str) -> tuple[str, Markup]:
        series = []
        for outcome in finished:
            line, best = lines[outcome.candidate.name], outcome.best
            points: Curve = getattr(best, curve)
            # The fall from the first value would hide all that sets variants apart.
            points = points[1:] if len(points) > _FEW_POINTS else points
            series.append(Series(line.name, points, line.colour, dashed=line.dashed))
        return title, line_plot(series, label=title, x_name=x_name, legend=False)

    plots = [
        drawn("Held-out loss by tokens", "tokens trained on", "loss_by_tokens"),
        drawn("Held-out loss by time", "seconds of training", "loss_by_seconds"),
    ]
    return [(title, plot) for title, plot in plots if plot]


def _intervals(finished: Sequence[Outcome], lines: dict[str, Line]) -> Markup:
    marks = [
        Mark(
            outcome.candidate.name,
            outcome.loss.mean,
            outcome.loss.margin,
            [record.loss for record in outcome.runs],
            lines[outcome.candidate.name].colour,
            loss_words(outcome.loss),
        )
        for outcome in finished
        if outcome.loss is not None
    ]
    marks.sort(key=lambda mark: mark.value)
    return interval_plot(marks, label="Held-out loss of each variant", x_name="held-out loss")


def _tried(outcome: Outcome) -> list[tuple[str, str, bool]]:
    """Each of the settings tried, its loss, and whether it is the best."""
    return [
        (
            describe(record.job.settings),
            "failed" if record.failure is not None else format_decimal(record.loss),
            record is outcome.best,
        )
        for record in outcome.tried
    ]


def _answers(finished: Sequence[Outcome]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Each prompt with the answers of all candidates."""
    by_prompt: dict[str, list[tuple[str, str, bool]]] = {}
    for outcome in finished:
        for prompt, answer, stopped in outcome.measured.answers:
            by_prompt.setdefault(prompt, []).append((outcome.candidate.name, answer, stopped))
    return list(by_prompt.items())
