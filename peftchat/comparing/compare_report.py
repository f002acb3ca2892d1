"""The table of a comparison as words, for terminal and page alike."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.comparing.candidates import describe
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.outcomes import CandidateResult, Estimate
from peftchat.comparing.recommend import loss_gap, loss_words, thousandths
from peftchat.comparing.results import ComparisonResult
from peftchat.files import write_text
from peftchat.formatting import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_percent,
    format_short_count,
)
from peftchat.reports.page import write_page
from peftchat.reports.svg import Mark, Series, interval_plot, line_plot

if TYPE_CHECKING:
    from peftchat.comparing.outcomes import Curve


HEADERS = (
    "variant",
    "settings",
    "held-out loss",
    "above the lowest",
    "plain text",
    "tokens/s",
    "time",
    "peak memory",
    "trained",
    "on disk",
    "merged",
)
"""Columns; all but the first two and the last are numbers."""

_MERGES = {"same": "same", "differs": "DIFFERS", "does not fold": "does not fold", "nothing to fold": "whole model"}


@dataclass(frozen=True)
class TableRow:
    """One candidate.

    Attributes:
        cells: a text for each of the headers; empty where there is nothing to say.
        failure: why there are no numbers.
        chosen: it is the one recommended.
        tied: it cannot be told from the lowest.
    """

    cells: Sequence[str]
    failure: str | None
    chosen: bool
    tied: bool


def table_rows(result: ComparisonResult) -> list[TableRow]:
    """The candidates by their loss, failed ones last."""
    finished = sorted(
        (outcome for outcome in result.outcomes if outcome.loss is not None),
        key=lambda outcome: outcome.loss.mean if outcome.loss else 0.0,
    )
    failed = [outcome for outcome in result.outcomes if outcome.loss is None]
    return [_row(result, outcome) for outcome in (*finished, *failed)]


def _row(result: ComparisonResult, outcome: CandidateResult) -> TableRow:
    advice, best, loss = result.recommendation, outcome.best, outcome.loss
    if best is None or loss is None or advice is None:
        reasons = [record.failure for record in outcome.failures if record.failure]
        blank = [""] * (len(HEADERS) - 1)
        return TableRow((outcome.candidate.name, *blank), reasons[0] if reasons else "not run yet", False, False)
    above = loss_gap(advice.lowest, outcome)
    cells = (
        outcome.candidate.name,
        describe(outcome.settings),
        loss_words(loss),
        "" if outcome is advice.lowest else _difference_words(above),
        forgetting_text(outcome, result.base_plain_loss),
        format_count(outcome.tokens_per_second),
        format_duration(outcome.seconds),
        format_bytes(outcome.peak_memory_bytes),
        format_short_count(best.trainable_parameters),
        format_bytes(best.weights_bytes),
        _MERGES.get(outcome.measured.merge or "", ""),
    )
    return TableRow(cells, None, outcome is advice.choice, outcome in advice.tied)


def _difference_words(above: Estimate) -> str:
    return f"{above.mean:+.3f}" + ("" if above.margin is None else f" ± {thousandths(above.margin)}")


def forgetting_text(outcome: CandidateResult, base: float | None) -> str:
    """Loss on plain text after training, and how far that is from the base's."""
    after = outcome.measured.plain_loss
    if after is None:
        return UNKNOWN if outcome.measured.failure else ""
    if not base:
        return format_decimal(after)
    change = after / base - 1
    return f"{format_decimal(after)} ({'+' if change >= 0 else '-'}{format_percent(abs(change))})"


_WORDS = ("variant", "settings", "merged")
_WIDE = 400
_FIRST_TO_GO = ("on disk", "above the lowest", "merged", "time", "plain text", "trained", "tokens/s")
"""Columns that a narrow terminal does without, in this order; the page has them all."""


def print_comparison(result: ComparisonResult, console: Console) -> None:
    """Print the table, the recommendation and its reasons."""
    table = _fitting(table_rows(result), console.width if console.is_terminal else None)
    # A file or a pipe has no width to keep to.
    Console(file=console.file, width=max(console.width, _natural_width(table))).print(table)
    wrap = not console.is_terminal
    advice = result.recommendation
    if advice is None:
        return
    console.print(Text(advice.headline, style="bold green"))
    for reason in advice.reasons:
        console.print(Text(f"  {reason}"), soft_wrap=wrap)
    for caution in advice.cautions:
        console.print(Text.assemble(("  note: ", "yellow"), caution), soft_wrap=wrap)


def _fitting(rows: Sequence[TableRow], width: int | None) -> Table:
    """The table with as many columns as fit `width`; all of them without a limit."""
    left = list(HEADERS)
    table = _table(rows, left)
    for header in _FIRST_TO_GO:
        if width is None or _natural_width(table) <= width:
            break
        left.remove(header)
        table = _table(rows, left)
    return table


def _natural_width(table: Table) -> int:
    """Characters that a table takes without wrapping."""
    return Console(width=_WIDE).measure(table).maximum


def _table(rows: Sequence[TableRow], headers: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header in _WORDS else "right", no_wrap=True)
    for row in rows:
        if row.failure is not None:
            table.add_row(Text(row.cells[0], style="red"), Text("failed", style="red"))
            continue
        cells = [cell for header, cell in zip(HEADERS, row.cells, strict=True) if header in headers]
        style = "bold green" if row.chosen else "" if row.tied else "dim"
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


COLORS = 10
"""Line colors of the page; more lines than that begin again, dashed."""

_FEW_POINTS = 3


@dataclass(frozen=True)
class Line:
    """How a candidate is drawn."""

    name: str
    color: int
    dashed: bool


def write_comparison_files(result: ComparisonResult, folder: ComparisonFolder) -> None:
    """Write `comparison.json`, `report.html` and, if a candidate finished, `recommended.yaml`."""
    # Answers may hold lone surrogates, for which UTF-8 has no bytes; escaped that way they are JSON again.
    text = json.dumps(result.as_dict(folder), indent=2, ensure_ascii=False) + "\n"
    write_text(folder.result, text, errors="backslashreplace")
    if result.recommendation is not None:
        write_text(folder.recommended, result.recommended_recipe(folder), errors="backslashreplace")
    write_comparison(folder.report, result, folder.recommended)


def write_comparison(path: Path, result: ComparisonResult, recommended: Path) -> Path:
    """Write the page.

    Args:
        recommended: the recipe that the page tells how to run.
    """
    advice = result.recommendation
    finished = [outcome for outcome in result.outcomes if outcome.best is not None]
    lines = {
        outcome.candidate.name: Line(outcome.candidate.name, place % COLORS, place >= COLORS)
        for place, outcome in enumerate(result.outcomes)
    }
    return write_page(
        path,
        "compare.html.jinja",
        advice=advice,
        headers=HEADERS,
        rows=table_rows(result),
        lines=[lines[outcome.candidate.name] for outcome in finished],
        colors=COLORS,
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


def _facts(result: ComparisonResult, finished: Sequence[CandidateResult]) -> list[str]:
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


def _plots(finished: Sequence[CandidateResult], lines: dict[str, Line]) -> list[tuple[str, Markup]]:
    def drawn(title: str, x_name: str, curve: str) -> tuple[str, Markup]:
        series = []
        for outcome in finished:
            line, best = lines[outcome.candidate.name], outcome.best
            points: Curve = getattr(best, curve)
            # The fall from the first value would hide all that sets variants apart.
            points = points[1:] if len(points) > _FEW_POINTS else points
            series.append(Series(line.name, points, line.color, dashed=line.dashed))
        return title, line_plot(series, label=title, x_name=x_name, legend=False)

    plots = [
        drawn("Held-out loss by tokens", "tokens trained on", "loss_by_tokens"),
        drawn("Held-out loss by time", "seconds of training", "loss_by_seconds"),
    ]
    return [(title, plot) for title, plot in plots if plot]


def _intervals(finished: Sequence[CandidateResult], lines: dict[str, Line]) -> Markup:
    marks = [
        Mark(
            outcome.candidate.name,
            outcome.loss.mean,
            outcome.loss.margin,
            [record.loss for record in outcome.runs],
            lines[outcome.candidate.name].color,
            loss_words(outcome.loss),
        )
        for outcome in finished
        if outcome.loss is not None
    ]
    marks.sort(key=lambda mark: mark.value)
    return interval_plot(marks, label="Held-out loss of each variant", x_name="held-out loss")


def _tried(outcome: CandidateResult) -> list[tuple[str, str, bool]]:
    """Each of the settings tried, its loss, and whether it is the best."""
    return [
        (
            describe(record.job.settings),
            "failed" if record.failure is not None else format_decimal(record.loss),
            record is outcome.best,
        )
        for record in outcome.tried
    ]


def _answers(finished: Sequence[CandidateResult]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Each prompt with the answers of all candidates."""
    by_prompt: dict[str, list[tuple[str, str, bool]]] = {}
    for outcome in finished:
        for prompt, answer, stopped in outcome.measured.answers:
            by_prompt.setdefault(prompt, []).append((outcome.candidate.name, answer, stopped))
    return list(by_prompt.items())
